"""How a kernel's numbers are judged: relative RMS against float64, next to PyTorch in the same precision."""

import torch

FLOOR = 1e-5  # for values that are exact in one of the two


def seeded(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def relative_rms(x, truth):
    """RMS of x - truth over the RMS of truth. Values that are equal, infinite ones too, count as 0 in the first."""
    x, truth = x.double(), truth.double()
    difference = torch.where(x == truth, 0.0, x - truth).square().mean().sqrt()
    scale = torch.where(truth.isinf(), 0.0, truth).square().mean().sqrt()
    return (difference / scale.clamp_min(1e-30)).item()


def run(fn, inputs, grads):
    """Outputs of fn(*inputs) and the gradients of every floating input, for the given output gradients."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) if torch.is_tensor(t) else t for t in inputs]
    out = fn(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    wanted = [t for t in leaves if torch.is_tensor(t) and t.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, [g.to(o.dtype, copy=True) for g, o in zip(grads, outputs)])
    return [o.detach() for o in outputs], list(gradients)


def comparisons(ours, reference, inputs, grads):
    """Yield (what, relative RMS of ours, allowed) for each output and gradient.

    `ours` and `reference` are functions of `inputs`. Allowed is twice the distance from float64 of `reference` in the
    inputs' precision. A value that is not a number is never allowed.
    """
    grads = [g.to(inputs[0].dtype) for g in grads]  # what all three are given
    got = run(ours, inputs, grads)
    theirs = run(reference, inputs, grads)
    truth = run(reference, [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs], grads)
    for kind, a, b, c in zip(("output", "gradient"), got, theirs, truth):
        for i, (mine, peer, exact) in enumerate(zip(a, b, c, strict=True)):
            assert mine.shape == exact.shape, f"{kind} {i}: shape {tuple(mine.shape)}, expected {tuple(exact.shape)}"
            assert mine.dtype == peer.dtype, f"{kind} {i}: dtype {mine.dtype}, expected {peer.dtype}"
            yield f"{kind} {i}", relative_rms(mine, exact), 2 * relative_rms(peer, exact) + FLOOR


def assert_as_good_as_pytorch(ours, reference, inputs, grads):
    """Raise AssertionError unless `ours` is at most twice as far from float64 as `reference` in the inputs' precision."""
    wrong = [
        f"{what}: relative RMS {error:.3g} against float64, allowed {allowed:.3g}"
        for what, error, allowed in comparisons(ours, reference, inputs, grads)
        if not error <= allowed
    ]
    assert not wrong, "; ".join(wrong)
