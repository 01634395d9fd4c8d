"""What a program costs, on small programs whose cost is counted by hand."""

import dataclasses

import pytest

from llama_jax.devices.chips import TPUS
from llama_jax.plan.cost import KERNEL_EFFICIENCY, Schedule, schedule_of
from llama_jax.plan.hlo import HBM, Array, Program

CHIP = TPUS["v5e"]

# A loop of 5 iterations over a matrix product [64, 128] x [128, 256] with its gather, a copy, a kernel, and a blocking sum.
PROGRAM = """HloModule step, is_scheduled=true, num_partitions=16

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%product (p0: bf16[64,128], p1: bf16[5,128,256], p2: s32[]) -> bf16[64,256] {
  %p0 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[5,128,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %slice = bf16[1,128,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p1, %p2, %p2, %p2), dynamic_slice_sizes={1,128,256}
  %flat = bf16[128,256]{1,0:T(8,128)(2,1)} bitcast(%slice)
  ROOT %conv = bf16[64,256]{1,0:T(8,128)(2,1)} convolution(%p0, %flat), dim_labels=bf_io->bf
}

%gathering (g0: bf16[8,256]) -> bf16[128,256] {
  %g0 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %start = u32[] custom-call(), custom_call_target="AsyncCollectiveStart"
  ROOT %gathered = bf16[128,256]{1,0:T(8,128)(2,1)} all-gather(%g0), channel_id=3, replica_groups=[1,16]<=[16], dimensions={0}
}

%body (b: (s32[], bf16[64,128], bf16[5,128,256], bf16[5,64,256])) -> (s32[], bf16[64,128], bf16[5,128,256], bf16[5,64,256]) {
  %b = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[5,128,256]{2,1,0}, bf16[5,64,256]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%b), index=1
  %w = bf16[5,128,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%b), index=2
  %stack = bf16[5,64,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%b), index=3
  %fusion.1 = bf16[64,256]{1,0:T(8,128)(2,1)} fusion(%x, %w, %i), kind=kOutput, calls=%product, metadata={op_name="jit(step)/layers/feed_forward/dot"}, backend_config={"estimated_cycles":"3000"}
  %fusion.2 = bf16[128,256]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%gathering, backend_config={"estimated_cycles":"0"}
  %copy.1 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy(%x), metadata={op_name="jit(step)/rematted_computation/layers/attention/copy"}, backend_config={"estimated_cycles":"1500"}
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %stacked = bf16[5,64,256]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%stack, %fusion.1, %i, %i, %i)
  ROOT %out = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[5,128,256]{2,1,0}, bf16[5,64,256]{2,1,0}) tuple(%next, %x, %w, %stacked)
}

%condition (c: (s32[], bf16[64,128], bf16[5,128,256], bf16[5,64,256])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[5,128,256]{2,1,0}, bf16[5,64,256]{2,1,0}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%c), index=0
  %end = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%at, %end), direction=LT
}

ENTRY %main (a: (s32[], bf16[64,128], bf16[5,128,256], bf16[5,64,256]), q: bf16[2,4,256,128], k: bf16[2,2,256,128]) -> f32[1024] {
  %a = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[5,128,256]{2,1,0}, bf16[5,64,256]{2,1,0}) parameter(0)
  %q = bf16[2,4,256,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %k = bf16[2,2,256,128]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  %mask = s8[1,1,1]{2,1,0} constant({...})
  %while.1 = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[5,128,256]{2,1,0}, bf16[5,64,256]{2,1,0}) while(%a), condition=%condition, body=%body
  %splash_mha_fwd_residuals.1 = (f32[2,256,128]{2,1,0:T(8,128)}, bf16[2,4,256,128]{3,2,1,0:T(8,128)(2,1)}) custom-call(%mask, %q, %k, %k), custom_call_target="tpu_custom_call"
  %gradient = f32[1024]{0:T(1024)} constant({...})
  ROOT %all-reduce.1 = f32[1024]{0:T(1024)} all-reduce(%gradient), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""


@pytest.fixture(scope="module")
def program() -> Program:
    return Program.parse(PROGRAM)


@pytest.fixture(scope="module")
def schedule(program: Program) -> Schedule:
    return schedule_of(program, CHIP)


def test_a_program_is_read_into_its_computations(program: Program) -> None:
    assert program.entry == "main" and program.devices == 16
    assert set(program.computations) == {"add", "product", "gathering", "body", "condition", "main"}
    copy = next(i for i in program.computations["body"] if i.opcode == "copy")
    assert copy.results == (Array("bf16", (64, 128), 1),) and copy.size == 64 * 128 * 2
    assert copy.operands == ["x"] and copy.cycles == 1500


def test_a_loop_runs_as_often_as_its_condition_says_where_the_compiler_does_not(program: Program) -> None:
    loop = next(i for i in program.computations["main"] if i.opcode == "while")
    assert loop.trips is None and program.trips(loop) == 5
    known = Program.parse(PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'))
    assert known.trips(next(i for i in known.computations["main"] if i.opcode == "while")) == 7


def test_what_a_loop_stacks_up_is_told_from_what_it_hands_on(program: Program) -> None:
    loop = next(i for i in program.computations["main"] if i.opcode == "while")
    assert [a.dims for a in program.changed(loop)] == [(), (5, 64, 256)]
    assert {a.memory for a in program.changed(loop)} == {HBM}


def test_matrix_products_and_the_rest_are_timed_by_their_cycles_in_every_iteration(schedule: Schedule) -> None:
    assert schedule.cost.matrix == pytest.approx(5 * 3000 / CHIP.clock)
    assert schedule.cost.other == pytest.approx(5 * 1500 / CHIP.clock)
    assert schedule.cost.flops == 5 * 2 * 64 * 128 * 256
    assert schedule.cost.parts["feed-forward"] == pytest.approx(5 * 3000 / CHIP.clock)
    assert schedule.cost.parts["attention, again"] == pytest.approx(5 * 1500 / CHIP.clock)


def test_collectives_are_timed_by_their_bytes_and_told_apart_by_whether_they_block(schedule: Schedule) -> None:
    found = {(c.kind, c.blocking): c for c in schedule.collectives}
    gather, total = found["all-gather", False], found["all-reduce", True]
    assert (gather.group, gather.count, gather.bytes) == (16, 5, 5 * 128 * 256 * 2)
    assert gather.seconds == pytest.approx(gather.bytes * 15 / 16 / CHIP.link_bytes)
    assert (total.group, total.count, total.bytes) == (4, 1, 4096)
    assert schedule.blocking == pytest.approx(2 * 4096 * 3 / 4 / CHIP.link_bytes)
    assert schedule.overlapped == pytest.approx(gather.seconds)


# Two collectives on a SparseCore, begun one after the other: a gather, and a sum of which each device keeps a part.
OFFLOADED = """HloModule step, is_scheduled=true, num_partitions=16

%gathered (p: bf16[8,4096]) -> bf16[128,4096] {
  %p = bf16[8,4096]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[128,4096]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,16]<=[16], dimensions={0}
}, execution_thread="sparsecore"

%scattered (q: bf16[128,4096]) -> bf16[8,4096] {
  %q = bf16[128,4096]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = bf16[8,4096]{1,0} reduce-scatter(%q), channel_id=2, replica_groups=[1,16]<=[16], dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (w: bf16[8,4096], g: bf16[128,4096]) -> bf16[8,4096] {
  %w = bf16[8,4096]{1,0} parameter(0)
  %g = bf16[128,4096]{1,0} parameter(1)
  %start.1 = ((), (), (s32[8192]{0})) custom-call-start(), custom_call_target="A", called_computations={%gathered}
  %update.1 = ((bf16[8,4096]{1,0}), bf16[128,4096]{1,0}, (s32[8192]{0})) custom-call-update(%start.1, %w)
  %start.2 = ((), (), (s32[8192]{0})) custom-call-start(), custom_call_target="B", called_computations={%scattered}
  %update.2 = ((bf16[128,4096]{1,0}), bf16[8,4096]{1,0}, (s32[8192]{0})) custom-call-update(%start.2, %g)
  %copy.1 = bf16[128,4096]{1,0} copy(%g), backend_config={"estimated_cycles":"CYCLES"}
  %done.1 = bf16[128,4096]{1,0} custom-call-done(%update.1)
  ROOT %done.2 = bf16[8,4096]{1,0} custom-call-done(%update.2)
}
"""


@pytest.mark.parametrize(
    ("covered", "gather", "scatter"), [(0.0, 1.0, 1.0), (0.25, 0.75, 1.0), (1.5, 0.0, 0.5), (3.0, 0.0, 0.0)]
)
def test_what_no_work_covers_of_a_collective_on_a_sparse_core_blocks(
    covered: float, gather: float, scatter: float
) -> None:
    """``covered``: the work between beginning and end, in the time that each of the two collectives takes."""
    size = 128 * 4096 * 2
    each = size * 15 / 16 / CHIP.link_bytes
    schedule = schedule_of(Program.parse(OFFLOADED.replace("CYCLES", str(round(covered * each * CHIP.clock)))), CHIP)
    found = {(c.kind, c.blocking): c.bytes for c in schedule.collectives}
    for kind, blocked in (("all-gather", gather), ("reduce-scatter", scatter)):
        assert found.get((kind, True), 0) == pytest.approx(blocked * size, abs=size / 1000)
        assert found.get((kind, True), 0) + found.get((kind, False), 0) == pytest.approx(size)
    assert schedule.blocking == pytest.approx((gather + scatter) * each, abs=each / 1000)
    assert schedule.cost.hbm_bytes == 2 * size  # the copy's alone


def test_a_kernel_is_timed_by_half_of_its_square_of_scores(schedule: Schedule) -> None:
    flops = 2 * 2 * (2 * 4 * 256 * 256 * 128) / 2
    assert dict(schedule.cost.kernels) == {"splash_mha_fwd_residuals": 1}
    assert schedule.kernels == pytest.approx(flops / CHIP.peak_flops / KERNEL_EFFICIENCY)
    cost = schedule.cost
    assert schedule.seconds == pytest.approx(cost.matrix + cost.other + schedule.blocking + schedule.kernels)


OFFLOADING = """HloModule step, num_partitions=1

ENTRY %main (kept: f32[4,8,1024], new: f32[1,8,1024], at: s32[]) -> f32[1,8,1024] {
  %kept = f32[4,8,1024]{2,1,0:T(8,128)S(5)} parameter(0)
  %new = f32[1,8,1024]{2,1,0:T(8,128)} parameter(1)
  %at = s32[]{:T(128)} parameter(2)
  %write = ((f32[4,8,1024]{2,1,0:T(8,128)S(5)}, f32[1,8,1024]{2,1,0:T(8,128)}, s32[]{:T(128)}, s32[]{:T(128)}, s32[]{:T(128)}), f32[4,8,1024]{2,1,0:T(8,128)S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%kept, %new, %at, %at, %at)
  %written = f32[4,8,1024]{2,1,0:T(8,128)S(5)} dynamic-update-slice-done(%write)
  %read = ((f32[4,8,1024]{2,1,0:T(8,128)S(5)}, s32[]{:T(128)}, s32[]{:T(128)}, s32[]{:T(128)}), f32[1,8,1024]{2,1,0:T(8,128)}, u32[]{:S(2)}) dynamic-slice-start(%written, %at, %at, %at), dynamic_slice_sizes={1,8,1024}
  ROOT %slice = f32[1,8,1024]{2,1,0:T(8,128)} dynamic-slice-done(%read)
}
"""


def test_slices_that_go_to_the_host_and_come_back_are_its_bytes() -> None:
    """As a layer's activations do, of ``--train.remat offload``. Within the chip they are bytes of its memory."""
    size = 8 * 1024 * 4
    cost = schedule_of(Program.parse(OFFLOADING), CHIP).cost
    assert (cost.host_bytes, cost.hbm_bytes) == (2 * size, 0)
    inside = schedule_of(Program.parse(OFFLOADING.replace("S(5)", "")), CHIP).cost
    assert (inside.host_bytes, inside.hbm_bytes) == (0, 2 * size)


def test_a_kernel_of_narrow_heads_takes_whole_lanes(schedule: Schedule) -> None:
    """A matrix unit that multiplies heads of 64 features is half empty."""
    narrow = Program.parse(PROGRAM.replace("256,128]{3,2,1,0", "256,64]{3,2,1,0"))
    assert schedule_of(narrow, CHIP).cost.kernel_flops == schedule.cost.kernel_flops > 0


def test_a_kernel_is_timed_by_the_pairs_that_a_sliding_window_leaves(schedule: Schedule, program: Program) -> None:
    assert schedule_of(program, CHIP, 0.125).kernels == pytest.approx(schedule.kernels / 4)


def test_a_slice_counts_as_read_and_not_what_it_is_cut_from(schedule: Schedule) -> None:
    x, w, y, heads = 64 * 128 * 2, 128 * 256 * 2, 64 * 256 * 2, 2 * 256 * 128 * 2
    product, gather, copy, stacking = x + w + y, x + w, x, 2 * y
    kernel = 4 * heads + 2 * 2 * heads + 1 + 2 * 256 * 128 * 4 + 4 * heads
    # The number of the iteration, 4 bytes, is read by the product, and its successor computed from two numbers.
    assert schedule.cost.hbm_bytes == 5 * (product + 4 + gather + copy + stacking + 12) + kernel


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("f32[8,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 8 * 16 * 4),
        ("f32[8,4]{1,0} convolution(%x, %w), dim_labels=bf_io->bf", 2 * 8 * 16 * 4),
    ],
)
def test_both_spellings_of_a_matrix_product_count_the_same(line: str, flops: int) -> None:
    text = (
        "ENTRY %main (x: f32[8,16], w: f32[16,4]) -> f32[8,4] {\n  %x = f32[8,16]{1,0} parameter(0)\n"
        f"  %w = f32[16,4]{{1,0}} parameter(1)\n  ROOT %y = {line}\n}}\n"
    )
    assert schedule_of(Program.parse(text), CHIP).cost.flops == flops


def test_a_batched_product_written_as_a_dilated_convolution_counts_its_true_pairs() -> None:
    """3 products [2, 5] x [5, 7]: XLA spreads the batch over a spatial axis, most of whose pairs are padding."""
    text = """ENTRY %main (x: f32[3,2,5], w: f32[3,5,7]) -> f32[3,2,7] {
  %x = f32[3,2,5]{2,1,0} parameter(0)
  %w = f32[3,5,7]{2,1,0} parameter(1)
  ROOT %y = f32[3,2,7]{2,1,0} convolution(%x, %w), window={size=3 stride=2 pad=2_2 lhs_dilate=3}, dim_labels=0bf_0io->0bf
}
"""
    assert schedule_of(Program.parse(text), CHIP).cost.flops == 3 * 2 * 2 * 5 * 7


def test_what_is_no_program_is_told() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        Program.parse("nothing of the sort")


SEND = """HloModule step, is_scheduled=true, num_partitions=4

ENTRY %main (gradient: f32[1024,1024]) -> f32[1024,1024] {
  %gradient = f32[1024,1024]{1,0:T(8,128)} parameter(0)
  %token = token[] after-all()
  %copy.1 = f32[1024,1024]{1,0:T(8,128)S(1)} copy(%gradient), backend_config={"estimated_cycles":"1500"}
  %send = (f32[1024,1024]{1,0:T(8,128)}, u32[], token[]) send(%gradient, %token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[1024,1024]{1,0:T(8,128)}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=3, is_host_transfer=true
  %received = (f32[1024,1024]{1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  ROOT %out = f32[1024,1024]{1,0:T(8,128)} get-tuple-element(%received), index=0
}
"""


def test_what_leaves_for_another_slice_goes_by_the_network_and_is_waited_for_where_it_takes_longest() -> None:
    """A sum over two slices: half of it is sent twice. A step takes no less than its network."""
    schedule = schedule_of(Program.parse(SEND), CHIP)
    (total,) = schedule.collectives
    assert (total.kind, total.group, total.count, total.bytes) == ("all-reduce between slices", 2, 1, 4 << 20)
    assert CHIP.slice_bytes and total.seconds == pytest.approx((4 << 20) / CHIP.slice_bytes)
    assert schedule.seconds == pytest.approx(total.seconds) and schedule.waiting < total.seconds
    assert schedule.cost.hbm_bytes == 4 << 20  # the copy's alone
    fast = dataclasses.replace(CHIP, slice_bytes=1e15)
    assert schedule_of(Program.parse(SEND), fast).waiting == 0


def test_a_step_takes_no_less_than_its_bytes() -> None:
    fast = dataclasses.replace(CHIP, slice_bytes=1e15)
    waits = schedule_of(Program.parse(SEND), fast)
    assert waits.seconds == pytest.approx((4 << 20) / CHIP.hbm_bandwidth)
    assert waits.waiting_for_memory == pytest.approx(waits.seconds - 1500 / CHIP.clock)
    works = schedule_of(Program.parse(SEND), dataclasses.replace(fast, hbm_bandwidth=1e15))
    assert works.waiting_for_memory == 0 and works.seconds == pytest.approx(1500 / CHIP.clock)


def test_the_slices_of_a_transfer_are_counted_by_their_ranges() -> None:
    (send,) = [i for i in Program.parse(SEND.replace("{1,2}x", "{0:5,7}x")).computations["main"] if i.opcode == "send"]
    assert send.between_slices == ("all-reduce", 7)
