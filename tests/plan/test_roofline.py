"""The lower bound of a program's time on a GPU, on a small program whose cost is counted by hand."""

import pytest

from llama_jax.devices.chips import GPUS
from llama_jax.plan.hlo import Program
from llama_jax.plan.roofline import roofline_of

CHIP = GPUS["h100"]
GEMM = 'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
SCORES = (
    '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "128", "128"], "tuple_shapes": []}'
)

# A loop of 3 iterations over products [64, 128] x [128, 256], one of them in a fusion, with a gather; then attention, and sums.
PROGRAM = f"""HloModule step, is_scheduled=true, num_partitions=8

%address (p0: bf16[64,128], p1: bf16[3,128,256], p2: s32[]) -> bf16[64,256] {{
  %p0 = bf16[64,128]{{1,0}} parameter(0)
  %p1 = bf16[3,128,256]{{2,1,0}} parameter(1)
  %p2 = s32[] parameter(2)
  %slice = bf16[1,128,256]{{2,1,0}} dynamic-slice(%p1, %p2, %p2, %p2), dynamic_slice_sizes={{1,128,256}}
  %flat = bf16[128,256]{{1,0}} bitcast(%slice)
  ROOT %inner = bf16[64,256]{{1,0}} custom-call(%p0, %flat), {GEMM}
}}

%body (b: (s32[], bf16[64,128], bf16[3,128,256])) -> (s32[], bf16[64,128], bf16[3,128,256]) {{
  %b = (s32[], bf16[64,128]{{1,0}}, bf16[3,128,256]{{2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = bf16[64,128]{{1,0}} get-tuple-element(%b), index=1
  %w = bf16[3,128,256]{{2,1,0}} get-tuple-element(%b), index=2
  %fused = bf16[64,256]{{1,0}} fusion(%x, %w, %i), kind=kCustom, calls=%address
  %part = bf16[16,256]{{1,0}} constant({{...}})
  %start = (bf16[16,256]{{1,0}}, bf16[128,256]{{1,0}}) all-gather-start(%part), channel_id=3, replica_groups=[1,8]<=[8], dimensions={{0}}
  %whole = bf16[128,256]{{1,0}} all-gather-done(%start)
  %product = (bf16[64,256]{{1,0}}, s8[33554432]{{0}}) custom-call(%x, %whole), {GEMM}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[64,128]{{1,0}}, bf16[3,128,256]{{2,1,0}}) tuple(%next, %x, %w)
}}

%condition (c: (s32[], bf16[64,128], bf16[3,128,256])) -> pred[] {{
  %c = (s32[], bf16[64,128]{{1,0}}, bf16[3,128,256]{{2,1,0}}) parameter(0)
  %at = s32[] get-tuple-element(%c), index=0
  %end = s32[] constant(3)
  ROOT %less = pred[] compare(%at, %end), direction=LT
}}

ENTRY %main (a: (s32[], bf16[64,128], bf16[3,128,256]), q: bf16[2,128,4,64], f: f32[32,16]) -> f32[8] {{
  %a = (s32[], bf16[64,128]{{1,0}}, bf16[3,128,256]{{2,1,0}}) parameter(0)
  %q = bf16[2,128,4,64]{{3,2,1,0}} parameter(1)
  %f = f32[32,16]{{1,0}} parameter(2)
  %loop = (s32[], bf16[64,128]{{1,0}}, bf16[3,128,256]{{2,1,0}}) while(%a), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %forward = (bf16[2,4,128,64]{{3,1,2,0}}, f32[2,4,128]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={{"cudnn_fmha_backend_config": {{{SCORES}}}}}
  %backward = (bf16[2,4,128,64]{{3,1,2,0}}, bf16[2,4,128,64]{{3,1,2,0}}, bf16[2,4,128,64]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={{"cudnn_fmha_backend_config": {{{SCORES}}}}}
  %single = (f32[32,8]{{1,0}}, s8[33554432]{{0}}) custom-call(%f, %f), {GEMM}
  ROOT %sum = f32[8]{{0}} all-reduce(%f), channel_id=4, replica_groups=[1,8]<=[8], to_apply=%condition
}}
"""
FOUND = roofline_of(Program.parse(PROGRAM), CHIP)


def test_products_count_wherever_they_are_called_as_often_as_they_run() -> None:
    loops, single = 3 * 2 * (2 * 64 * 256 * 128), 2 * 32 * 8 * 16
    assert FOUND.cost.flops == loops + single
    attention = (2 + 5) * 2 * 0.5 * (2 * 4 * 128 * 128) * 64
    assert FOUND.cost.kernel_flops == attention
    assert FOUND.cost.kernels == {"cudnn$fmhaSoftmax": 1, "cudnn$fmhaSoftmaxBackward": 1}
    # Float32 runs as TF32, at half the speed.
    assert FOUND.by_resource["matrix"] == pytest.approx((loops + attention + 2 * single) / CHIP.peak_flops)


@pytest.mark.parametrize("kind", ["f8e4m3fn", "f8e5m2", "s8"])
def test_eight_bits_are_half_of_the_bytes_at_twice_the_peak(kind: str) -> None:
    """Arrays of every type are read, of loops too: of a type that was not, a loop had fewer results than its body."""
    half = Program.parse(PROGRAM.replace("bf16[64,128]", f"{kind}[64,128]"))
    (loop,) = (i for i in half.computations[half.entry] if i.opcode == "while")
    assert [a.dtype for a in loop.results] == ["s32", kind, "bf16"]
    assert half.changed(loop)[0].dtype == "s32"
    found = roofline_of(half, CHIP)
    assert found.cost.flops == FOUND.cost.flops
    products = 3 * 2 * 2.0 * 64 * 256 * 128 / CHIP.peak_flops
    assert FOUND.cost.matrix - found.cost.matrix == pytest.approx(products / 2)
    assert FOUND.cost.hbm_bytes - found.cost.hbm_bytes == 3 * 2 * 64 * 128


def test_a_window_leaves_fewer_pairs_to_attention() -> None:
    assert roofline_of(Program.parse(PROGRAM), CHIP, seen=0.25).cost.kernel_flops == FOUND.cost.kernel_flops / 2


def test_bytes_are_those_of_operands_and_results_without_the_librarys_working_memory() -> None:
    product = 2 * (64 * 128 + 128 * 256 + 64 * 256)
    q, f = 2 * 2 * 128 * 4 * 64, 4 * 32 * 16
    kernels = (3 * q + q + 4 * 2 * 4 * 128) + (3 * q + 3 * q)
    scalars = 3 * 3 * 4  # the loop's counter: two are read and one is written
    assert FOUND.cost.hbm_bytes == 3 * 2 * product + kernels + (2 * f + 4 * 32 * 8) + scalars + 3 * 4
    assert FOUND.by_resource["memory"] == FOUND.cost.hbm_bytes / CHIP.hbm_bandwidth


def test_links_carry_what_a_gpu_lacks_and_a_sum_once() -> None:
    gathered = 3 * 2 * 128 * 256 * 7 / 8
    assert FOUND.by_resource["links"] == pytest.approx((gathered + 4 * 8) / CHIP.link_bytes)


def test_a_step_takes_at_least_the_longest_of_the_three() -> None:
    assert FOUND.seconds == max(FOUND.by_resource.values()) == FOUND.by_resource["memory"]
