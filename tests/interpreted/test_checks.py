"""Each check of memory and order on a kernel with that fault and without, and the proofs on results that are right and wrong."""

import proof
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError

from bigtrain_kernels import checks
from bigtrain_kernels.interpreter import KernelError, checked, huge, poison


@triton.jit
def copy(X, OUT, T, stride_x, stride_out, D: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr, SHIFT: tl.constexpr):
    """Rows of [T, D], BLOCK rows a program. SHIFT displaces what is stored, to make two programs meet."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    mask = row[:, None] < T if MASK else tl.full([BLOCK, 1], True, tl.int1)
    x = tl.load(X + row[:, None] * stride_x + column[None, :], mask=mask)
    target = row - (SHIFT if tl.program_id(0) > 0 else 0)
    tl.store(OUT + target[:, None] * stride_out + column[None, :], x, mask=mask)


def run_copy(x, out, *, mask=True, shift=0, stride=None, block=4):
    grid = (triton.cdiv(len(x), block),)
    copy[grid](x, out, len(x), x.stride(0) if stride is None else stride, out.stride(0), D=8, BLOCK=block, MASK=mask, SHIFT=shift)
    return out


def test_a_right_kernel_passes_all_checks():
    x = torch.randn(10, 8)
    with checked(shuffle=3) as launches:
        out = run_copy(x, torch.empty_like(x))
    assert torch.equal(out, x)
    assert launches == [("copy", (3, 1, 1), 320, 320)]


@pytest.mark.parametrize("where", ["whole", "view"])
def test_out_of_bounds(where):
    """Beyond the end of a tensor, although another one lies there."""
    storage = torch.randn(20, 8)
    x = storage[:10] if where == "view" else storage[:10].clone()
    with (
        checked(),
        pytest.raises(KernelError, match=r"copy: program \(2, 0, 0\) of \(3, 1, 1\) loads from X out of bounds: 16 of 32 lanes"),
    ):
        run_copy(x, storage.new_zeros(12, 8), mask=False)
    with checked(), pytest.raises(KernelError, match="stores to OUT out of bounds: 16 of 32 lanes, first at offset 80"):
        run_copy(torch.randn(12, 8), storage.new_zeros(10, 8))


def test_out_of_bounds_before_the_beginning():
    with checked(), pytest.raises(KernelError, match="stores to OUT out of bounds: 32 of 32 lanes, first at offset -32"):
        run_copy(torch.randn(8, 8), torch.zeros(8, 8), shift=8)


def test_the_gaps_of_a_strided_tensor_are_out_of_bounds():
    left = torch.randn(8, 16)[:, :8]
    with checked():
        assert torch.equal(run_copy(left, torch.empty(8, 8)), left)
    with checked(), pytest.raises(KernelError, match="loads from X out of bounds: 16 of 32 lanes, first at offset 8"):
        run_copy(left, torch.empty(8, 8), stride=8)  # rows 1 and 3 of four


def test_transposed_expanded_and_empty_tensors():
    x = torch.randn(8, 8)
    with checked():
        assert torch.equal(run_copy(torch.arange(8.0).expand(6, 8), torch.empty(6, 8)), torch.arange(8.0).expand(6, 8))
        assert torch.equal(run_copy(x.T, torch.empty(8, 8), stride=8), x)
        run_copy(torch.empty(0, 8), torch.empty(0, 8))
    with checked(), pytest.raises(KernelError, match="loads from X out of bounds: 32 of 32 lanes"):
        copy[(1,)](torch.empty(0, 8), torch.empty(4, 8), 4, 8, 8, D=8, BLOCK=4, MASK=True, SHIFT=0)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_two_programs_store_one_element(seed):
    with checked(shuffle=seed), pytest.raises(KernelError, match=r"stores to OUT what program \(.*\) stores too: (8|16) of 32 lanes"):
        run_copy(torch.randn(12, 8), torch.zeros(12, 8), shift=1)


@triton.jit
def shift_rows(X, T, stride, D: tl.constexpr):
    """In place: row i becomes row i + 1, which another program overwrites."""
    row, column = tl.program_id(0), tl.arange(0, D)
    x = tl.load(X + (row + 1) % T * stride + column)
    tl.store(X + row * stride + column, x)


@pytest.mark.parametrize("seed", range(4))
def test_a_program_loads_what_another_stores(seed):
    """In every order: before or after the store."""
    with checked(shuffle=seed), pytest.raises(KernelError, match=r"X what program .* (stores|loads): 8 of 8 lanes"):
        shift_rows[(4,)](torch.randn(4, 8), 4, 8, D=8)


def test_a_program_may_change_its_own_elements_and_many_may_read_one():
    x = torch.randn(4, 8)
    with checked(shuffle=0):
        shift_rows[(1,)](x, 1, 8, D=8)
        run_copy(x[:1].expand(12, 8), torch.empty(12, 8))


@triton.jit
def collide(OUT, N: tl.constexpr):
    tl.store(OUT + tl.arange(0, N) // 2, tl.arange(0, N))


def test_one_store_writes_an_element_twice():
    with checked(), pytest.raises(KernelError, match="stores to OUT twice at once: 4 of 8 lanes"):
        collide[(1,)](torch.zeros(4, dtype=torch.int32), N=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64])
@pytest.mark.parametrize("fresh", ["empty", "empty_like", "new_empty", "empty_strided"])
def test_elements_that_nothing_writes(fresh, dtype):
    x = torch.ones(10, 8).to(dtype)

    def allocate():
        if fresh == "empty":
            return torch.empty(12, 8, dtype=dtype)
        if fresh == "empty_strided":
            return torch.empty_strided((12, 8), (8, 1), dtype=dtype)
        return torch.empty_like(x.new_zeros(12, 8)) if fresh == "empty_like" else x.new_empty(12, 8)

    with pytest.raises(KernelError, match=r"copy: OUT of shape \(12, 8\) has 16 elements that nothing has written"), checked():
        run_copy(x, allocate())
    with checked():
        out = allocate()
        run_copy(x, out[:10])
        run_copy(x[:2], out[10:])
    assert not dtype.is_floating_point or poison(torch.empty(3, dtype=dtype)).isnan().all()


def test_a_load_of_memory_that_nothing_has_written():
    with checked(), pytest.raises(KernelError, match="loads from X what nothing has written: 32 of 32 lanes"):
        run_copy(torch.empty(10, 8), torch.zeros(10, 8))


def test_the_order_of_programs_is_shuffled():
    seen = []

    def watch(*grid):
        seen.append(grid)

    with checked(shuffle=5), pytest.MonkeyPatch.context() as patch:
        enter = stock.InterpreterBuilder.set_grid_idx
        patch.setattr(stock.InterpreterBuilder, "set_grid_idx", lambda builder, *i: (enter(builder, *i), watch(*builder.grid_idx)))
        run_copy(torch.randn(40, 8), torch.empty(40, 8))
    assert sorted(seen) == [(i, 0, 0) for i in range(10)] != seen


@triton.jit
def rows_of_a_grid(OUT, wide: tl.constexpr):
    tl.store(OUT + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)), tl.program_id(0) * 10 + tl.program_id(1))


@pytest.mark.parametrize("seed", [None, 7])
def test_program_ids_are_those_of_the_grid(seed):
    with checked(shuffle=seed) as launches:
        out = torch.empty(3, 4, dtype=torch.int32)
        rows_of_a_grid[lambda meta: (3, 4)](out, wide=1)
    assert torch.equal(out, torch.arange(3, dtype=torch.int32)[:, None] * 10 + torch.arange(4, dtype=torch.int32))
    assert launches[0].grid == (3, 4, 1)


@triton.jit
def mark(X, stride, LONG: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) if LONG else tl.program_id(0)
    tl.store(X + row * stride + tl.arange(0, N), tl.zeros([N], X.dtype.element_ty) + 1.0)


def test_offsets_beyond_32_bits():
    """The last row of 2^32 bytes of bf16, of which 4 KiB are touched."""
    x = huge((2**20 + 1, 2048), torch.bfloat16)
    assert x.numel() > 2**31

    def last(grid):
        return [(grid[0] - 1, 0, 0)]

    with checked(programs=last) as launches:
        mark[(len(x),)](x, 2048, LONG=True, N=2048)
    assert launches == [("mark", (2**20 + 1, 1, 1), 0, 4096)]
    assert x[-1].sum() == 2048 and x[-2].sum() == 0
    with (
        checked(programs=last),
        pytest.raises(KernelError, match=r"\(1048576, 0, 0\) .* overflows int32 in multiply: 1 of 1 lanes"),
    ):
        mark[(len(x),)](x, 2048, LONG=False, N=2048)


def test_an_offset_that_wrapped_is_out_of_bounds(monkeypatch):
    x = huge((2**20 + 1, 2048), torch.bfloat16)
    monkeypatch.setattr(checks, "WRAPPING", ())
    with checked(programs=lambda grid: [(grid[0] - 1, 0, 0)]), pytest.raises(KernelError, match="first at offset -2147483648"):
        mark[(len(x),)](x, 2048, LONG=False, N=2048)


@triton.jit
def count(OUT):
    tl.atomic_add(OUT, 1)


def test_atomics_are_refused_and_checks_end_with_their_block():
    out = torch.zeros(1, dtype=torch.int32)
    with checked(), pytest.raises(KernelError, match="count: an atomic operation"):
        count[(2,)](out)
    count[(2,)](out)
    assert out.item() == 2
    with checked(), pytest.raises(RuntimeError, match="does not nest"), checked():
        pass


def test_other_errors_of_a_kernel_stay_as_they_are():
    with checked(), pytest.raises(InterpreterError, match="power of 2"):
        run_copy(torch.ones(3, 8), torch.ones(3, 8), block=3)


def test_the_fixture_checks(checked):
    run_copy(torch.randn(3, 8), torch.empty(3, 8))
    assert [launch.kernel for launch in checked] == ["copy"]


# Proofs


def test_right_results_pass_and_false_alarms_are_rare():
    for seed in range(200):
        torch.manual_seed(seed)
        exact = torch.randn(64, 16, dtype=torch.float64) * torch.rand(16, dtype=torch.float64)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            proof.check([exact.to(dtype)] * 2, [exact.to(dtype)] * 2, [exact] * 2, limit=proof.FORWARD)


def test_a_scalar_may_be_less_lucky_than_plain_torch():
    exact = torch.tensor(1.0, dtype=torch.float64)
    proof.check(torch.tensor(1 + 2**-23), torch.tensor(1.0), exact, limit=proof.FORWARD)
    with pytest.raises(AssertionError, match="error norm"):
        proof.check(torch.tensor(1 + 2**-20), torch.tensor(1.0), exact, limit=proof.FORWARD)


def truncated(x: torch.Tensor) -> torch.Tensor:
    return (x.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (truncated, "signed bias in magnitude"),
        (lambda x: (x + 1e-3).bfloat16(), "signed bias in value"),
        (lambda x: (x * 1.003).bfloat16(), "signed bias in magnitude"),
        (lambda x: (x + torch.randn_like(x) * 0.006 * x.abs()).bfloat16(), "times plain torch"),
        (lambda x: (x + torch.randn_like(x) * 0.006).bfloat16(), "RMS ratio"),
        (lambda x: x.bfloat16().index_fill_(0, torch.tensor(3), float("nan")), "16 of 8192 not finite"),
        (lambda x: x.float(), "torch.float32, expected .* torch.bfloat16"),
        (lambda x: x[:-1].bfloat16(), "expected"),
    ],
    ids=["truncated", "shifted", "scaled", "noisy", "rms", "nan", "dtype", "shape"],
)
def test_wrong_results_are_told(change, fault):
    exact = torch.randn(512, 16, dtype=torch.float64)
    with pytest.raises(AssertionError, match=f"(?s)tensor 1: .*{fault}"):
        proof.check([exact.bfloat16(), change(exact)], [exact.bfloat16()] * 2, [exact] * 2, limit=proof.FORWARD)


draws = iter([truncated, torch.Tensor.bfloat16, torch.Tensor.bfloat16])


def test_a_bias_that_two_more_draws_do_not_show_is_chance():
    """conftest.py runs it three times."""
    exact = torch.randn(512, 16, dtype=torch.float64)
    proof.check(next(draws)(exact), exact.bfloat16(), exact, limit=proof.FORWARD)


@pytest.mark.xfail(raises=proof.Biased, strict=True)
def test_a_bias_of_every_draw_fails():
    exact = torch.randn(512, 16, dtype=torch.float64)
    proof.check(truncated(exact), exact.bfloat16(), exact, limit=proof.FORWARD)


def test_a_quarter_of_the_values_truncated_is_told():
    exact = torch.randn(1024, 16, dtype=torch.float64)
    ours = exact.bfloat16()
    ours[:, ::4] = truncated(exact[:, ::4])
    with pytest.raises(AssertionError, match="magnitude"):
        proof.check(ours, exact.bfloat16(), exact, limit=proof.FORWARD)


def test_infinities_and_integers():
    exact = torch.tensor([1.0, float("-inf"), float("nan"), 1e300], dtype=torch.float64)
    right = exact.float()
    proof.check([right, torch.tensor([3])], [right, torch.tensor([3])], [exact, torch.tensor([3])], limit=proof.FORWARD)
    for wrong in (float("inf"), 0.0, float("nan")):
        ours = right.clone()
        ours[1] = wrong
        with pytest.raises(AssertionError, match="not finite"):
            proof.check(ours, right, exact, limit=proof.FORWARD)
    with pytest.raises(AssertionError, match="1 of 1 integers differ"):
        proof.check(torch.tensor([4]), torch.tensor([3]), torch.tensor([3]), limit=proof.FORWARD)
    with pytest.raises(AssertionError, match="1 results against 2"):
        proof.check(right, [right, right], [exact, exact], limit=proof.FORWARD)


def test_results_that_cancel_to_zero():
    exact, ours = torch.zeros(100, dtype=torch.float64), torch.full((100,), 1e-8)
    with pytest.raises(AssertionError, match="error norm"):
        proof.check(ours, torch.zeros(100), exact, limit=proof.FORWARD)
    proof.check(ours, torch.zeros(100), exact, limit=proof.FORWARD, zero=1e-7)


class Half(torch.autograd.Function):
    """x * y, with a gradient of y that is 0.1 % off."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return grad * y, grad * x * 1.001


def test_differences():
    inputs = [torch.randn(5, 7), torch.randn(7)]

    def plain(x, y):
        return (x * y).sin().sum(1), (x * y).exp()

    proof.differences(plain, plain, inputs)
    with pytest.raises(AssertionError, match="input 1: slope"):
        proof.differences(lambda x, y: Half.apply(x, y.expand_as(x)), lambda x, y: x * y, inputs)


def test_strided_keeps_values_and_hides_nan_between():
    x = torch.randn(2, 3, 8)
    y = proof.strided(x)
    assert torch.equal(x, y) and not y.is_contiguous() and y.stride(-1) == 1
    assert y.as_strided((8,), (1,), 8).isnan().all()


def test_same_in_any_order():
    x = torch.randn(40, 8)
    proof.same_in_any_order(lambda: run_copy(x, torch.empty_like(x)))
    state = iter(range(3))
    with pytest.raises(AssertionError, match="tensor 0 differs with order 0"):
        proof.same_in_any_order(lambda: run_copy(x + next(state), torch.empty_like(x)))
