"""How the kernels' tests judge numbers: relative RMS against float64, next to PyTorch in the same precision."""

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["triton", "torch"]


def seeded(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def relative_rms(x, truth):
    truth = truth.double()
    return ((x.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt().clamp_min(1e-30)).item()


def run(fn, inputs, grads):
    """Outputs of fn(*inputs) and the gradients of every floating input, for the given output gradients."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) if torch.is_tensor(t) else t for t in inputs]
    out = fn(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    wanted = [t for t in leaves if torch.is_tensor(t) and t.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, [g.to(o.dtype, copy=True) for g, o in zip(grads, outputs)])
    return [o.detach() for o in outputs], list(gradients)


def assert_as_good_as_pytorch(ours, reference, inputs, grads):
    """Outputs and gradients of `ours` are at most twice as far from float64 as `reference` in the inputs' precision.

    Both are functions of `inputs`; 1e-5 is added for values that are exact in one of the two.
    """
    grads = [g.to(inputs[0].dtype) for g in grads]  # what all three are given
    got = run(ours, inputs, grads)
    theirs = run(reference, inputs, grads)
    truth = run(reference, [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs], grads)
    for kind, a, b, c in zip(("output", "gradient"), got, theirs, truth):
        for i, (mine, peer, exact) in enumerate(zip(a, b, c)):
            assert mine.shape == exact.shape, f"{kind} {i}: shape {tuple(mine.shape)}, expected {tuple(exact.shape)}"
            assert mine.dtype == peer.dtype, f"{kind} {i}: dtype {mine.dtype}, expected {peer.dtype}"
            error, allowed = relative_rms(mine, exact), 2 * relative_rms(peer, exact) + 1e-5
            assert error <= allowed, f"{kind} {i}: relative RMS {error:.3g} against float64, allowed {allowed:.3g}"
