"""Engines: the same function by other kernels, and what each refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minisd
from minisd import backends
from minisd.backends import attention, openvino

CALL = {"seed": 1, "steps": 2}


def latents(sd):
    *_, last = sd.denoise("red heart", **CALL)
    return last.latents


@pytest.fixture(scope="module")
def exact():
    return minisd.StableDiffusion.load()


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The openvino engine with a cache of its own."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("causal", [False, True])
def test_plain_attention_is_attention(causal):
    q, k, v = torch.randn(3, 2, 3, 20, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(attention.plain(q, k, v, is_causal=causal), expected)


def test_attention_by_rows_in_blocks_of_any_size(monkeypatch):
    q, k, v = torch.randn(2, 3, 21, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    monkeypatch.setattr(attention, "BLOCK", 7 * 4)  # four rows, and one that is left over
    torch.testing.assert_close(attention.by_rows(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_attention_without_a_fused_kernel_never_holds_all_scores():
    """Shapes alone, on the meta device: there is none of those devices here."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            self.numbers = max(self.numbers, *(one.numel() for one in tree_leaves(result) if torch.is_tensor(one)))
            return result

    q = torch.empty(2, 2, 16384, 40, device="meta")
    with Largest() as seen:
        assert attention.attend(q, q, q).shape == q.shape
    assert seen.numbers == q.numel()


def test_attention_in_bfloat16_is_about_as_close_as_torchs_kernel():
    """Measured: 1.5 times torch's error, since the scores are rounded too; the whole UNet's is in the ledger."""
    q, k, v = torch.randn(3, 1, 2, 512, 40, generator=torch.manual_seed(0))
    expected = F.scaled_dot_product_attention(q, k, v)
    half = [part.bfloat16() for part in (q, k, v)]
    ours, theirs = attention.attend(*half), F.scaled_dot_product_attention(*half)
    assert (ours - expected).square().mean().sqrt() < 1.7 * (theirs - expected).square().mean().sqrt()


def test_fast_is_the_same_function_and_keeps_up_with_its_weights(exact):
    fast = minisd.StableDiffusion.load(engine="fast")
    torch.testing.assert_close(latents(fast), latents(exact), rtol=0, atol=2e-5)
    layer = fast.unet.middle[0].attention.self_attn.out
    x = torch.randn(1, 4, layer.in_features)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))
    assert fast.unet.state_dict().keys() == exact.unet.state_dict().keys()


def test_openvino_converts_once_and_notices_damage(exact, cached, capsys):
    results = []
    for damage in (None, None, b"damage"):
        if damage:
            for path in cached.rglob("model.bin"):
                path.write_bytes(damage)
        sd = minisd.StableDiffusion.load(engine="openvino")
        results.append(latents(sd))
        converted = "converting the UNet" in capsys.readouterr().err
        assert converted == (len(results) != 2)
        torch.testing.assert_close(results[-1], latents(exact), rtol=0, atol=5e-5)


def test_openvino_refuses_hooks(cached):
    sd = minisd.StableDiffusion.load(engine="openvino")
    with sd.taps("unet.down.0*"), pytest.raises(ValueError, match="LoRAs and taps"):
        latents(sd)


def test_openvino_without_a_cache(exact, cached):
    (cached / "minisd").write_text("a file is in the way")
    with pytest.warns(UserWarning, match="cannot be kept"):
        torch.testing.assert_close(
            latents(minisd.StableDiffusion.load(engine="openvino")), latents(exact), atol=5e-5, rtol=0
        )


def test_engines_that_are_not_there(monkeypatch):
    with pytest.raises(ValueError, match="must be one of exact, fast"):
        minisd.StableDiffusion.load(engine="slow")
    monkeypatch.setattr(backends, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"minisd\[openvino\]"):
        minisd.StableDiffusion.load(engine="openvino")
    part = torch.nn.Linear(1, 1, device="meta")
    with pytest.raises(ValueError, match="works on the CPU"):
        openvino.prepare(part)
