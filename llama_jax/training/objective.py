"""The objective of training: the cross entropy of next tokens, or the DPO loss of preferences.

DPO is direct preference optimization (Rafailov et al., 2023). A pair's margin says how much likelier than the reference
the model finds the chosen answer, less the same of the rejected one. The reference is the model that training began
with. Its log-likelihoods are computed once, before the first step (reference.py), so that no second model is held.

B rows, P pairs of a row, T positions.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import Config, ModelArgs
from llama_jax.data.batches import Batch, PackedBatch, PairBatch
from llama_jax.data.conversations import Pairs
from llama_jax.model import Llama
from llama_jax.ops.loss import log_likelihoods, loss_sum

# Sums over pairs of what metrics.jsonl has means of.
Rewards = dict[str, jax.Array]
REWARDS = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")
# A margin up to this is a tie: rounding makes as much of a model that is compared with itself.
TIE = 1e-5


@dataclass(frozen=True)
class NextToken:
    """Next-token prediction: the mean of the cross entropy over the tokens that count."""

    rewards: tuple[str, ...] = ()

    def length(self, args: ModelArgs) -> int:
        """Return the number of positions of a batch's rows."""
        return args.max_seq_len

    def count(self, batch: Batch | PackedBatch) -> jax.Array:
        """Return the number of items whose losses are averaged, float32 []."""
        return jnp.sum(jnp.asarray(batch.weights))

    def sums(self, model: Llama, params: Any, batch: Batch | PackedBatch) -> tuple[jax.Array, Rewards]:
        """Return the sum of the losses of a batch, float32 [], and the sums of ``rewards``, of which there are none."""
        return loss_sum(model, params, *batch), {}


@dataclass(frozen=True)
class Dpo:
    """Direct preference optimization: the mean over pairs of -log sigmoid(margin), equation 7 of the paper.

    Arguments:
        beta: the factor of log-likelihood ratios in margins and rewards.
        label_smoothing: the share of pairs that are taken to be the wrong way round (conservative DPO).
        most_pairs: the most pairs of a row.
        positions: the number of positions of a row.
    """

    beta: float
    label_smoothing: float
    most_pairs: int
    positions: int
    rewards: tuple[str, ...] = REWARDS

    def length(self, args: ModelArgs) -> int:
        """Return the number of positions of a batch's rows."""
        return self.positions

    def count(self, batch: PairBatch) -> jax.Array:
        """Return the number of pairs, float32 []."""
        return jnp.sum(self._is_pair(batch), dtype=jnp.float32)

    def sums(self, model: Llama, params: Any, batch: PairBatch) -> tuple[jax.Array, Rewards]:
        """Return the sum of the losses of a batch's pairs, float32 [], and the sums of ``rewards``."""
        inputs, targets, _, segments, positions, _ = batch
        return self.of_likelihoods(log_likelihoods(model, params, inputs, targets, segments, positions), batch)

    def of_likelihoods(self, found: jax.Array, batch: PairBatch) -> tuple[jax.Array, Rewards]:
        """Return ``sums`` from the log-likelihoods of the batch's targets, float32 [B, T].

        Ratios are taken token by token. Sums over an answer may be hundreds of nats, whose difference would lose
        digits.
        """
        weights = jnp.asarray(batch.weights)
        ratios = jnp.where(weights != 0, found - batch.reference, 0.0)
        chosen = self.beta * self._of_pairs(batch, jnp.where(weights > 0, ratios, 0.0))
        rejected = self.beta * self._of_pairs(batch, jnp.where(weights < 0, ratios, 0.0))
        margins, is_pair = chosen - rejected, self._is_pair(batch)
        losses = (1 - self.label_smoothing) * jax.nn.softplus(-margins) + self.label_smoothing * jax.nn.softplus(
            margins
        )
        right = 0.5 * (1 + jnp.sign(jnp.where(jnp.abs(margins) > TIE, margins, 0.0)))  # a tie counts half
        values = dict(zip(REWARDS, (margins, right, chosen, rejected), strict=True))
        return jnp.sum(losses * is_pair), {name: jnp.sum(value * is_pair) for name, value in values.items()}

    def _of_pairs(self, batch: PairBatch, values: jax.Array) -> jax.Array:
        """Return the sums over the positions of each pair: [B, T] -> [B, P]."""
        pairs = jnp.asarray(batch.segments) // 2
        is_of = pairs[:, None, :] == jnp.arange(self.most_pairs)[:, None]
        return jnp.sum(jnp.where(is_of, values[:, None, :], 0.0), axis=-1)

    def _is_pair(self, batch: PairBatch) -> jax.Array:
        """Return whether a row has so many pairs: bool [B, P]. Padding has no weights."""
        return self._of_pairs(batch, jnp.abs(jnp.asarray(batch.weights))) > 0


Objective = NextToken | Dpo


def make_objective(config: Config, most_pairs: int = 1) -> Objective:
    """Return the objective of a run, whose sequences hold ``most_pairs`` preferences at most."""
    train = config.train
    if train.objective == "next-token":
        return NextToken()
    positions = Pairs.positions(config.model.max_seq_len)
    return Dpo(train.dpo_beta, train.dpo_label_smoothing, most_pairs, positions)
