"""What the tests use of JAX's private names."""

import jax
from jax._src import xla_bridge
from jax._src.clusters import cloud_tpu_cluster as cloud_tpu_cluster
from jax._src.cudnn import fused_attention_stablehlo as cudnn

assert hasattr(cudnn, "check_cudnn_version") and hasattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm"), (
    f"jax {jax.__version__} has moved what tests patch"
)


def backends_are_initialized() -> bool:
    """Whether JAX has started the backends of this process, with their threads."""
    return bool(xla_bridge.backends_are_initialized())
