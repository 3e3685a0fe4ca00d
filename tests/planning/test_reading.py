"""Parsing of compiled programs: trip counts, replica groups, FLOPs, bytes, collectives."""

import numpy as np
import pytest

from lm.planning import compute, hlo, links

# A loop of five iterations; each has a matmul of [8, 16] and [16, 4], and an all-reduce over
# pairs of devices.
TEXT = """
HloModule jit_f, is_scheduled=true

%cond (p: (s32[], bf16[8,16])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %q = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%q), index=1
  %w = bf16[16,4]{1,0:T(8,128)(2,1)} constant({...})
  %dot = bf16[8,4]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf
  %sum = bf16[8,4]{1,0:T(8,128)(2,1)} all-reduce(%dot), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%x, %x)
}

ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="a"}
  %t0 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%a, %a)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) while(%t0), condition=%cond, body=%body
  ROOT %out = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_instructions_in_a_loop_are_counted_per_iteration():
    program = hlo.parse(TEXT)
    times = {each.name: times for each, _, times, _ in program.executed()}
    assert times["dot"] == times["sum"] == 5
    assert times["loop"] == 1


def test_flops_of_matmuls():
    work = compute.work(hlo.parse(TEXT), flops_rate=1.0, bytes_rate=1e9)
    assert work.flops == 5 * 2 * 8 * 16 * 4


def test_array_sizes_with_and_without_padding():
    (array,) = hlo.arrays("f32[3,100]{1,0:T(8,128)}")
    assert (array.nbytes, array.padded) == (3 * 100 * 4, 8 * 128 * 4)
    (vector,) = hlo.arrays("bf16[64]{0:T(128)(2,1)S(1)}")
    assert (vector.padded, vector.space) == (256, 1)


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1','axis_0'}", [[0, 2, 1, 3]]),
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}",
            [[0, 1], [2, 3]],
        ),
        ("channel_id=1", [[0, 1, 2, 3]]),
    ],
)
def test_every_notation_of_replica_groups_is_parsed(attributes, groups):
    assert links.replica_groups(attributes, 4).tolist() == groups


def test_flops_of_a_batched_matmul():
    # [B, T, D] x [B, D, F]: on TPUs a convolution with a window of B elements over an input with
    # gaps of B - 1, so that each window overlaps one element.
    text = (
        "  %y = bf16[4,8,16]{2,1,0} convolution(%a, %b), window={size=4 stride=3 pad=0_0 "
        "lhs_dilate=4}, dim_labels=0bf_0io->0bf"
    )
    (each,) = hlo.parse("ENTRY %m (a: f32[]) -> f32[] {\n" + text + "\n}").computations["m"]
    flops = compute._convolution(each, (4, 8, 32), (4, 32, 16))
    assert flops == 4 * 2 * 8 * 32 * 16


def test_collective_time_depends_on_the_torus():
    nbytes, link = 1 << 30, 100e9
    ring, line = [(4, True)], [(4, False)]
    all_gather = links.seconds("all-gather", nbytes, ring, link)
    assert links.seconds("all-gather", nbytes, line, link) > 1.9 * all_gather
    assert links.seconds("all-reduce", nbytes, ring, link) == pytest.approx(2 * all_gather)
    # Two dimensions have twice the links of one.
    both = links.seconds("all-gather", nbytes, [(4, True), (4, True)], link)
    assert both < 0.7 * all_gather
    assert links.seconds("all-gather", nbytes, [], link) == 0


def test_mesh_axes_of_a_replica_group():
    class Device:
        def __init__(self, x, y):
            self.coords = (x, y, 0)

    class FakeSlice:
        shape, chip = (2, 2), None

        def rings(self):
            return (False, False)

    grid = np.array([Device(x, y) for x in range(2) for y in range(2)]).reshape(2, 2)
    layout = links.Layout(grid, ("data", "fsdp"), FakeSlice())
    assert layout.crossed(np.array([[0, 1], [2, 3]])) == "fsdp"
    assert layout.crossed(np.array([[0, 2], [1, 3]])) == "data"
    assert layout.crossed(np.array([[0, 1, 2, 3]])) == "data+fsdp"
    assert layout.route(np.array([[0, 3]])) == (2, 1)


def test_transfers_over_the_same_link_share_its_bandwidth():
    class Device:
        def __init__(self, x):
            self.coords = (x, 0, 0)

    class FakeSlice:
        shape, chip = (8,), None

        def __init__(self, ring):
            self.rings = lambda: (ring,)

    grid = np.array([Device(x) for x in range(8)])
    line, ring = (links.Layout(grid, ("data",), FakeSlice(closed)) for closed in (False, True))
    to_next, across = (np.array([[i, (i + by) % 8] for i in range(8)]) for by in (1, 4))
    # On a line the path from last to first is long but uses the other direction of the links.
    assert line.route(to_next) == (7, 1) and ring.route(to_next) == (1, 1)
    assert line.route(across) == (4, 4) and ring.route(across) == (4, 4)


def test_a_fusion_that_slices_an_operand_reads_only_the_slice():
    # The stacked inputs of all layers are sliced through a bitcast, in a fusion inside the fusion.
    text = """
%inner (p0: bf16[80,16,128]) -> bf16[16,128] {
  %p0 = bf16[80,16,128]{2,1,0} parameter(0)
  %flat = bf16[80,2048]{1,0} bitcast(%p0)
  ROOT %one = bf16[1,2048]{1,0} dynamic-slice(%flat, %i, %z), dynamic_slice_sizes={1,2048}
}

%outer (q0: bf16[80,16,128], q1: bf16[16,128]) -> bf16[16,128] {
  %q0 = bf16[80,16,128]{2,1,0} parameter(0)
  %q1 = bf16[16,128]{1,0} parameter(1)
  %layer = bf16[1,2048]{1,0} fusion(%q0), kind=kLoop, calls=%inner
  ROOT %y = bf16[16,128]{1,0} add(%layer, %q1)
}

ENTRY %main (stack: bf16[80,16,128], x: bf16[16,128]) -> bf16[16,128] {
  %stack = bf16[80,16,128]{2,1,0} parameter(0)
  %x = bf16[16,128]{1,0} parameter(1)
  ROOT %out = bf16[16,128]{1,0} fusion(%stack, %x), kind=kLoop, calls=%outer
}
"""
    work = compute.work(hlo.parse(text), flops_rate=1.0, bytes_rate=1e9)
    assert work.nbytes == 3 * 2 * 16 * 128


def test_an_all_gather_on_sparse_cores_is_asynchronous():
    text = """
%on_sparse_core (p: bf16[64,128]) -> bf16[256,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  ROOT %gathered = bf16[256,128]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[64,128]) -> bf16[256,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %s = ((bf16[64,128]{1,0}), bf16[256,128]{1,0}) call-start(%a), to_apply=%on_sparse_core
  ROOT %d = bf16[256,128]{1,0} call-done(%s)
}
"""
    executed = list(links._executed(hlo.parse(text)))
    assert [(kind, times, early) for kind, _, times, early in executed] == [("all-gather", 1, True)]
    assert compute.work(hlo.parse(text), flops_rate=1.0, bytes_rate=1.0).nbytes == 0
