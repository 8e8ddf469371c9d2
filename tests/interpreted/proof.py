"""What counts as the right numbers: comparisons with float64, and finite differences. Test files `import proof`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import currently_in_test_context
from torch import Tensor

from bigtrain_kernels.checks import checked

FORWARD, BACKWARD = 2.0, 3.0
"""`limit` of `check`: how many times the error of plain torch in the same dtype ours may have."""
RMS = {torch.bfloat16: 0.005, torch.float16: 0.005, torch.float32: 1e-5}
"""Root mean square of the error over that of the exact values, at most."""
STANDARD_ERRORS, IN_RANDOM_EXAMPLES = 3.0, 5.0
"""Beyond these lies a signed bias. Beyond 3 one mean in 370 is by chance: conftest.py draws inputs anew before a test fails for it.
Hypothesis repeats the inputs that failed, and looks for such: 5, by chance one in two million."""
BIAS = "signed bias"
MANY = 1000
"""Values from which norms and means hardly scatter, rows that share an error and all: in bf16 the RMS ratios of attention's
gradients lie at 0.003 at length 200, and from 0.002 to 0.007 at length 3."""


class Biased(AssertionError):
    """Nothing but signed biases: a line for each."""

    @property
    def found(self) -> set[str]:
        """In which tensors, of values or magnitudes, and to which side."""
        return {line.partition(": mean")[0] for line in str(self).splitlines()}


def check(
    ours: Sequence[Tensor] | Tensor, plain: Sequence[Tensor] | Tensor, exact: Sequence[Tensor] | Tensor, *, limit: float, zero: float = 0.0
) -> None:
    """Hold our results against plain torch's in the same dtype and against the exact ones in float64, tensor by tensor.

    - The norm of our error is at most `limit` times that of plain torch's (FORWARD or BACKWARD), or what one rounding of the exact
      values may cost: plain torch may be exact. Fewer than MANY values may have worse luck than plain torch's: both bounds grow with
      the fourth root of what is missing.
    - Of MANY values or more, its RMS ratio is below RMS or no higher than plain torch's: what cancels has few right digits in any code.
    - Of MANY distinct values, it has no signed bias, in value or in magnitude (truncation shrinks both signs).
    - Where the exact value is infinite or NaN ours is the same; where it is finite ours is.

    `zero` is the root mean square error that counts as none, for results that cancel to zero. Integers must be equal.
    Raises AssertionError that names the tensor by its place and says by how much; Biased where the bias alone is wrong.
    """
    ours, plain, exact = ([x] if isinstance(x, Tensor) else list(x) for x in (ours, plain, exact))
    assert len(ours) == len(plain) == len(exact), f"{len(ours)} results against {len(plain)} plain and {len(exact)} exact ones"
    failures = [f"tensor {i}: {fault}" for i, three in enumerate(zip(ours, plain, exact)) for fault in _faults(*three, limit, zero)]
    if failures:
        raise (Biased if all(BIAS in line for line in failures) else AssertionError)("\n".join(failures))


def _faults(ours: Tensor, plain: Tensor, exact: Tensor, limit: float, zero: float):
    if ours.shape != exact.shape or ours.dtype != plain.dtype:
        yield f"{tuple(ours.shape)} {ours.dtype}, expected {tuple(exact.shape)} {plain.dtype}"
        return
    if not ours.is_floating_point():
        if not torch.equal(ours, exact.to(ours.dtype)):
            yield f"{int((ours != exact).sum())} of {ours.numel()} integers differ"
        return
    dtype, (ours, plain, exact) = ours.dtype, (x.detach().double().flatten() for x in (ours, plain, exact))
    # Beyond the largest finite number of the dtype infinity is the rounded value.
    exact = torch.where(exact.to(dtype).isfinite(), exact, exact.to(dtype).double())
    finite = exact.isfinite()
    strange = ours.isfinite() != finite
    strange |= ~finite & (ours != exact) & ~(ours.isnan() & exact.isnan())
    if strange.any():
        at = int(strange.nonzero()[0])
        yield f"{int(strange.sum())} of {len(ours)} not finite where the exact values are, or otherwise: first {ours[at]} for {exact[at]}"
        return
    ours, plain, exact = ours[finite], plain[finite], exact[finite]
    if not len(exact):
        return
    error, unit = ours - exact, torch.finfo(dtype).eps / 2
    size, norm, plain_norm = float(exact.norm()), float(error.norm()), float((plain - exact).nan_to_num().norm())
    rms, none = RMS.get(dtype, 1e-12), zero * len(exact) ** 0.5
    luck = max(1.0, MANY / len(exact)) ** 0.25
    if not norm <= max(luck * limit * plain_norm, luck * unit * size, none):
        yield f"error norm {norm:.3g}, {norm / max(plain_norm, 1e-300):.2f} times plain torch's {plain_norm:.3g}; at most {limit:g} times"
    if len(exact) < MANY:
        return
    if not norm <= max(rms * size, plain_norm, none):
        yield f"error RMS ratio {norm / max(size, 1e-300):.3g}, at most {rms:g}"
    # Rounded constants (log2(e) times a scale) shift all float32 results alike; a tenth of the RMS ratio is left to them.
    allowed = max((unit / 10 if dtype.itemsize < 4 else rms / 10) * float(exact.abs().mean()), zero)
    yield from _bias("value", error, exact, allowed)
    yield from _bias("magnitude", error * exact.sign(), exact, allowed)


def _bias(of: str, error: Tensor, exact: Tensor, allowed: float):
    distinct = len(exact.unique())  # equal values are rounded alike: one observation
    if distinct < MANY:
        return
    mean, deviation = float(error.mean()), float(error.std()) / distinct**0.5
    limit = IN_RANDOM_EXAMPLES if currently_in_test_context() else STANDARD_ERRORS
    if abs(mean) > max(limit * deviation, allowed):
        times = abs(mean) / max(deviation, 1e-300)
        side = "above" if mean > 0 else "below"
        yield f"{BIAS} in {of}, {side}: mean error {mean:.3g} is {times:.1f} standard errors; at most {limit:g}"


def differences(
    ours: Callable[..., Tensor | tuple[Tensor, ...]], plain: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor],
    *, tolerance: float = 1e-4, step: float = 1e-5, directions: int = 3,
) -> None:  # fmt: skip
    """Hold the gradients of `ours`, taken in float32, against central differences of `plain`, the mathematics in float64.

    For each input, along random directions d and for a random cotangent w of the outputs:
    <gradient, d> against <w, plain(x + step d) - plain(x - step d)> / (2 step), to `tolerance` times the gradient's norm.
    Both functions are called with `inputs` and return one tensor or several. Raises AssertionError that names the input by its place.
    """
    leaves = [x.detach().float().requires_grad_() for x in inputs]
    outputs = _several(ours(*leaves))
    weights = [torch.randn(x.shape) for x in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    wide = [x.detach().double() for x in leaves]

    def value(i: int, x: Tensor) -> Tensor:
        return sum((w.double() * out.detach()).sum() for w, out in zip(weights, _several(plain(*wide[:i], x, *wide[i + 1 :]))))

    for i, gradient in enumerate(gradients):
        for _ in range(directions):
            direction = torch.randn(gradient.shape, dtype=torch.float64)
            slope = float(value(i, wide[i] + step * direction) - value(i, wide[i] - step * direction)) / (2 * step)
            found, size = float((gradient.double() * direction).sum()), float(gradient.double().norm())
            assert abs(found - slope) <= tolerance * size + 1e-8, (
                f"input {i}: slope {found:.6g} by our gradient, {slope:.6g} by differences"
            )


def _several(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def strided(x: Tensor) -> Tensor:
    """The same values in memory that has gaps: every dimension but the last is a slice of a larger one, filled with NaN between."""
    gaps = x.new_full([n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 16], float("nan") if x.is_floating_point() else 99)
    view = gaps[tuple(slice(n) for n in x.shape)]
    return view.copy_(x)


def same_in_any_order(function: Callable[[], Tensor | tuple[Tensor, ...]], orders: int = 2) -> None:
    """Run `function` under `checked` with its programs in order and in `orders` random ones: the same bits each time."""
    results = []
    for seed in (None, *range(orders)):
        with checked(shuffle=seed):
            results.append(_several(function()))
    for seed, outputs in enumerate(results[1:]):
        for i, (first, other) in enumerate(zip(results[0], outputs)):
            assert torch.equal(_bits(first), _bits(other)), f"tensor {i} differs with order {seed}"


def _bits(x: Tensor) -> Tensor:
    return x.detach().flatten().view(torch.uint8)
