"""The least time of a compiled program's kernels, on programs whose bytes and operations are counted by hand."""

import pytest

from train.plan import kernel_model

# A loop of three turns: a product, a write of it into a stack, a read of one slice of another stack; then attention.
PROGRAM = """HloModule step, is_scheduled=true

%product (p0: bf16[8,16], p1: bf16[16,4]) -> f32[8,4] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[16,4]{1,0} parameter(1)
  %dot.1 = f32[8,4]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %add = f32[8,4]{1,0} add(%dot.1, %dot.1)
}

%keep (stack: f32[3,8,4], i: s32[], x: f32[8,4]) -> f32[3,8,4] {
  %stack = f32[3,8,4]{2,1,0} parameter(0)
  %x = f32[8,4]{1,0} parameter(2)
  %one = f32[1,8,4]{2,1,0} bitcast(%x)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %dus = f32[3,8,4]{2,1,0} dynamic-update-slice(%stack, %one, %i, %zero, %zero)
}

%take (stack.1: bf16[3,16,4], i.1: s32[]) -> bf16[1,16,4] {
  %stack.1 = bf16[3,16,4]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %part = bf16[1,16,4]{2,1,0} dynamic-slice(%stack.1, %i.1, %zero.1, %zero.1), dynamic_slice_sizes={1,16,4}
  ROOT %negated = bf16[1,16,4]{2,1,0} negate(%part)
}

%both (a: f32[100], b: f32[100]) -> (f32[100], f32[]) {
  %a = f32[100]{0} parameter(0)
  %b = f32[100]{0} parameter(1)
  %sum.1 = f32[100]{0} add(%a, %b)
  %total = f32[] reduce(%sum.1, %a), dimensions={0}
  ROOT %results = (f32[100]{0}, f32[]) tuple(%sum.1, %total)
}

%body (state: (s32[], f32[3,8,4], bf16[8,16], /*index=3*/bf16[3,16,4])) -> (s32[], f32[3,8,4]) {
  %state = (s32[], f32[3,8,4]{2,1,0}, bf16[8,16]{1,0}, /*index=3*/bf16[3,16,4]{2,1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %kept = f32[3,8,4]{2,1,0} get-tuple-element(%state), index=1
  %left = bf16[8,16]{1,0} get-tuple-element(%state), index=2
  %weights = bf16[3,16,4]{2,1,0} get-tuple-element(%state), index=3
  %taken = bf16[1,16,4]{2,1,0} fusion(%weights, %turn), kind=kLoop, calls=%take
  %flat = bf16[16,4]{1,0} bitcast(%taken)
  %made = f32[8,4]{1,0} fusion(%left, %flat), kind=kCustom, calls=%product, metadata={op_name="jit(f)/dot(x)"}
  ROOT %written = f32[3,8,4]{2,1,0} fusion(%kept, %turn, %made), kind=kLoop, calls=%keep
}

%rare (s: f32[100]) -> f32[100] {
  %s = f32[100]{0} parameter(0)
  ROOT %copied = f32[100]{0} copy(%s)
}

%often (t: f32[100]) -> f32[100] {
  ROOT %t = f32[100]{0} parameter(0)
}

ENTRY %main (x: f32[100], y: f32[100], c: pred[], q: bf16[2,64,3,16]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %y = f32[100]{0} parameter(1)
  %c = pred[] parameter(2)
  %q = bf16[2,64,3,16]{3,2,1,0} parameter(3)
  %loop = (s32[], f32[3,8,4]{2,1,0}) while(%x), condition=%often, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %mixed = (bf16[2,3,64,16]{3,2,1,0}, f32[2,3,64]{2,1,0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"mask_type":"CAUSAL"}
  %pair = (f32[100]{0}, f32[]) fusion(%x, %y), kind=kInput, calls=%both
  %first = f32[100]{0} get-tuple-element(%pair), index=0
  %gathered = f32[800]{0} all-gather(%first), dimensions={0}
  ROOT %end = f32[100]{0} conditional(%c, %first, %first), true_computation=%rare, false_computation=%often
}
"""  # noqa: E501


def test_bytes_and_operations_by_hand():
    found = {kernel.name: kernel for kernel in kernel_model.kernels(PROGRAM)}
    assert list(found) == ["taken", "made", "written", "mixed", "pair", "gathered", "copied"]
    assert [found[name].times for name in ("taken", "made", "written", "copied")] == [3, 3, 3, 1]
    assert {name: found[name].kind for name in found} == {
        "taken": "elementwise",
        "made": "products",
        "written": "copies",
        "mixed": "attention",
        "pair": "elementwise",
        "gathered": "collectives",
        "copied": "copies",
    }
    assert found["made"].operations == 2 * 8 * 16 * 4 and found["taken"].operations == 0
    # One half of two products of 64 x 64 scores, of 2 sequences and 3 heads of 16.
    assert found["mixed"].operations == 2 * (2 * 2 * 3 * 64 * 64 * 16) / 2
    assert found["made"].bytes == 2 * 8 * 16 + 2 * 16 * 4 + 4 * 8 * 4
    assert (
        found["taken"].bytes == 2 * (2 * 16 * 4) + 4
    )  # a slice is read and written, its number is read
    assert found["written"].bytes == 2 * (4 * 8 * 4) + 4  # the stack is written in place
    assert found["pair"].bytes == 4 * (100 + 100 + 100 + 1)
    assert found["copied"].bytes == 2 * 400
    assert found["made"].source == "jit(f)/dot(x)"


def test_the_longer_of_the_two_limits_counts():
    def least(rate, bandwidth):
        return kernel_model.least(PROGRAM, rate, bandwidth)

    assert least(1e30, 1.0) == {  # by bytes alone
        "attention": pytest.approx(3 * 2 * 2 * 64 * 3 * 16 + 2 * 2 * 3 * 64 * 16 + 4 * 2 * 3 * 64),
        "elementwise": 3 * 260 + 1204,
        "copies": 3 * 260 + 800,
        "products": 3 * 512,
    }
    assert least(1.0, 1e30)["products"] == 3 * 1024
    assert next(iter(least(1.0, 1e30))) == "attention"  # the longest first
