"""The table of megatron-core's versions, and the names of it that are not its public interface."""

from flagscale_like.runtime import megatron_versions
from flagscale_like.runtime.device_shim import MODULES, SCOPED


def test_the_installed_version_is_in_the_table_and_has_every_name_that_is_used():
    assert megatron_versions.installed() in megatron_versions.VERSIONS
    patched = {(module, "torch"): why for module, why in MODULES.items()}
    scoped = {(module, ".".join(filter(None, (owner, name)))): why for (module, owner, name), why in SCOPED.items()}
    assert megatron_versions.absent({**megatron_versions.PRIVATE, **patched, **scoped}) == []


def test_a_name_that_a_version_lacks_is_said_with_its_use():
    gone = {
        ("megatron.core.optimizer.optimizer", "MegatronOptimizer.step_with_ready_gradients"): "engine: the update",
        ("megatron.core.gone", "name"): "nothing",
        ("megatron.core.optimizer.optimizer", "MegatronOptimizer.prepare_grads"): "is there",
    }
    assert megatron_versions.absent(gone) == [
        "megatron.core.optimizer.optimizer.MegatronOptimizer.step_with_ready_gradients (engine: the update)",
        "megatron.core.gone.name (nothing)",
    ]


def test_a_version_that_is_not_tested_is_said(monkeypatch):
    assert "tested: all tests" in megatron_versions.note()
    monkeypatch.setattr(megatron_versions, "version", lambda name: "0.99.0")
    assert megatron_versions.note().startswith("0.99.0, not tested: use one of 0.16.1, ")
