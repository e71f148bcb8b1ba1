"""The parts of the dialect one by one: tokenizer, text encoder, autoencoder, UNet, schedulers; where they come from."""

import copy
import pickle
import sys

import diffusers
import huggingface_hub
import pytest
import torch
import transformers

import minisd.diffusers as dialect
from minisd.checkpoint.hub import embedded_model

TEXTS = [
    "red heart",
    "",
    "a cat, two dogs' tails 12!",
    "café 😀 naïve  spaces",
    "don't <|endoftext|> x",
    "many words " * 60,
    "longer than any limit " * 2000,
]


@pytest.fixture(scope="module", params=("emoji", "clip"))
def tokenizers(request, twin):
    folder = embedded_model() if request.param == "emoji" else twin[1]
    return [
        library.CLIPTokenizer.from_pretrained(str(folder), subfolder="tokenizer") for library in (transformers, dialect)
    ]


CALLS = (
    {"padding": "max_length", "max_length": 77, "truncation": True},
    {"padding": "max_length", "truncation": True},
    {"padding": "max_length", "max_length": 9, "truncation": True},
    {"padding": "longest"},
    {"padding": True, "truncation": True, "max_length": 12},
    {"truncation": True},
    {},
    {"padding": "do_not_pad", "truncation": True, "max_length": 77},
    {"add_special_tokens": False, "truncation": True, "max_length": 5},
    {"add_special_tokens": False, "padding": "longest"},
    {"padding": "max_length", "max_length": 10, "truncation": True, "return_overflowing_tokens": True},
    {"truncation": True, "max_length": 10, "return_overflowing_tokens": True, "return_length": True},
    {"padding": "longest", "return_length": True, "return_overflowing_tokens": False},
)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_tokenizer_calls(tokenizers, call):
    theirs, mine = tokenizers
    for text in TEXTS:
        a, b = theirs(text, **call), mine(text, **call)
        assert {**b} == {**a} and b.input_ids == b["input_ids"]
    a, b = theirs(TEXTS, **call), mine(TEXTS, **call)
    assert {**b} == {**a}
    if call.get("padding") not in (None, "do_not_pad"):
        a, b = theirs(TEXTS, **call, return_tensors="pt"), mine(TEXTS, **call, return_tensors="pt").to("cpu")
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.attention_mask, b.attention_mask)
        assert a.input_ids.dtype == b.input_ids.dtype


@pytest.mark.parametrize("call", ({}, {"padding": "max_length", "max_length": 9}), ids=str)
def test_padding_what_was_encoded(tokenizers, call):
    rows = [[49, 50, 51], [52]]
    for given in ({"input_ids": rows}, [{"input_ids": row} for row in rows]):
        theirs, mine = (one.pad(given, **call) for one in tokenizers)
        assert {**theirs} == {**mine}
        theirs, mine = (one.pad(given, return_tensors="pt", **call) for one in tokenizers)
        assert torch.equal(theirs.input_ids, mine.input_ids) and torch.equal(theirs.attention_mask, mine.attention_mask)
    theirs, mine = (one.pad({"input_ids": rows[0]}, **call) for one in tokenizers)
    assert {**theirs} == {**mine}


def test_tokens_that_a_program_adds(twin):
    folder = twin[1]
    theirs, mine = (one.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer") for one in (transformers, dialect))
    text = "a <cat> and<DOG>red cat"
    for one in (theirs, mine):
        assert one.add_tokens("<cat>") == 1 and one.add_tokens(["<cat>", "<dog>"]) == 1
    ids = theirs(text).input_ids
    assert mine(text).input_ids == ids and len(mine) == len(theirs) and mine.vocab_size == theirs.vocab_size
    assert mine.decode(ids) == theirs.decode(ids) and mine.get_added_vocab() == theirs.get_added_vocab()
    encoder = dialect.CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    before = encoder.get_input_embeddings().weight.clone()
    table = encoder.resize_token_embeddings(len(mine))
    assert table is encoder.get_input_embeddings() and table.weight.shape[0] == len(mine) == encoder.config.vocab_size
    assert torch.equal(table.weight[: len(before)], before)
    reference = transformers.CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    reference.resize_token_embeddings(len(theirs)).weight.data[-2:] = 0.1
    table.weight.data[-2:] = 0.1
    assert torch.equal(encoder(torch.tensor([ids]))[0], reference(torch.tensor([ids]))[0])


def test_tokenizer_answers(tokenizers):
    theirs, mine = tokenizers
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert mine.encode(text) == theirs.encode(text) == ids
        assert mine.tokenize(text) == theirs.tokenize(text)
        assert mine.decode(torch.tensor(ids)) == mine.decode(ids) == theirs.decode(ids)
        assert mine.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
        assert [mine.decode(index) for index in ids] == [theirs.decode(index) for index in ids]
        assert mine.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
        assert mine.convert_ids_to_tokens(ids[0]) == theirs.convert_ids_to_tokens(ids[0])
    rows = theirs(TEXTS).input_ids
    assert mine.batch_decode(rows) == theirs.batch_decode(rows)
    tokens = ["cat</w>", "</w>", "not a token", "<|endoftext|>"]
    assert mine.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert mine.get_vocab() == theirs.get_vocab() and len(mine) == len(theirs) and mine.vocab_size == theirs.vocab_size
    for name in ("model_max_length", "bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(mine, name) == getattr(theirs, name), name
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(mine, name) == getattr(theirs, name), name


@pytest.fixture(scope="module")
def text_encoders(twin):
    return [
        library.CLIPTextModel.from_pretrained(twin[1], subfolder="text_encoder").eval()
        for library in (transformers, dialect)
    ]


@torch.no_grad()
def test_text_encoder(text_encoders):
    theirs, mine = text_encoders
    ids = torch.tensor([[49406, 320, 2368, *[49407] * 74], [49406, *range(400, 475), 49407]])
    a, b = theirs(ids, output_hidden_states=True), mine(ids, output_hidden_states=True)
    assert list(a) == list(b) and torch.equal(b[0], a[0]) and torch.equal(b[1], a[1])
    assert len(a.hidden_states) == len(b.hidden_states)
    assert all(torch.equal(x, y) for x, y in zip(a.hidden_states, b.hidden_states, strict=True))
    assert torch.equal(mine(ids, torch.ones_like(ids))[0], theirs(ids)[0])
    assert torch.equal(mine(ids[0])[0], theirs(ids[0])[0])
    assert len(mine(ids, return_dict=False)) == len(theirs(ids, return_dict=False)) == 2
    positions = torch.arange(77).flip(0)[None]
    assert torch.equal(mine(ids, position_ids=positions)[0], theirs(ids, position_ids=positions)[0])
    assert torch.equal(mine(ids)[0], mine.core(ids))


@torch.no_grad()
def test_the_encoder_as_older_programs_call_it(text_encoders):
    """With `text_model` and a mask that says what is so anyway."""
    mine = text_encoders[1]
    ids = torch.tensor([[49406, 320, 2368, 49407]])
    body = mine.text_model
    x = body.embeddings(inputs_embeds=body.embeddings.token_embedding(ids))
    mask = body._build_causal_attention_mask(1, 4, dtype=x.dtype)
    out = body.encoder(inputs_embeds=x, causal_attention_mask=mask, output_hidden_states=True, return_dict=None)
    assert torch.equal(body.final_layer_norm(out[0]), mine(ids)[0]) and len(out.hidden_states) == 13
    with pytest.raises(NotImplementedError, match="not causal"):
        body.encoder(inputs_embeds=x, causal_attention_mask=torch.zeros_like(mask))


def test_text_encoder_is_a_module(text_encoders):
    """Each weight once, whatever the number of names; what is replaced or moved is used."""
    theirs, mine = text_encoders
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert len(mine.state_dict()) == len(theirs.state_dict())
    twin_of_mine = copy.deepcopy(mine)
    table = torch.nn.Embedding(49408, 128)
    twin_of_mine.set_input_embeddings(table)
    ids = torch.tensor([[49406, 320, 49407]])
    assert twin_of_mine.get_input_embeddings() is table and twin_of_mine.core.token_embedding is table
    assert torch.equal(twin_of_mine(ids)[0], twin_of_mine.core(ids))
    assert not torch.equal(twin_of_mine(ids)[0], mine(ids)[0])
    half = copy.deepcopy(mine).half()
    assert half.dtype == half.core.final_norm.weight.dtype == half(ids)[0].dtype == torch.float16


def test_the_text_half_of_a_whole_clip(tmp_path):
    """Programs take the text encoder from CLIP's own repository, where a picture encoder stands beside it."""
    text = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 128}
    vision = text | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    whole = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    whole.save_pretrained(tmp_path)
    theirs, mine = (library.CLIPTextModel.from_pretrained(tmp_path) for library in (transformers, dialect))
    ids = torch.tensor([[49406, 320, 2368, 49407]])
    assert torch.equal(mine(ids)[0], theirs(ids)[0])


def test_dtypes_that_nobody_named():
    """Networks are float32, whatever the file; transformers keeps the file's."""
    folder = embedded_model()
    assert dialect.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").dtype == torch.float32
    theirs, mine = (
        library.CLIPTextModel.from_pretrained(folder, subfolder="text_encoder") for library in (transformers, dialect)
    )
    assert mine.dtype == theirs.dtype == torch.float16
    assert dialect.StableDiffusionPipeline.from_pretrained(folder).text_encoder.dtype == torch.float32
    assert dialect.AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_gradients_flow(twin):
    """Guidance by gradients needs them, and a VAE of its own folder is enough."""
    vae = dialect.AutoencoderKL.from_pretrained(twin[1] / "vae")
    z = torch.zeros(1, 4, 8, 8, requires_grad=True)
    vae.decode(z).sample.sum().backward()
    assert z.grad is not None and z.grad.abs().sum() > 0
    vae.requires_grad_(False)
    assert not any(p.requires_grad for p in vae.parameters())


def test_the_autoencoder_as_a_whole(twin):
    theirs, mine = (kind.AutoencoderKL.from_pretrained(twin[1], subfolder="vae") for kind in (diffusers, dialect))
    x = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(mine(x).sample, theirs(x).sample)
        a, b = (vae(x, True, False, torch.Generator().manual_seed(1))[0] for vae in (theirs, mine))
        assert torch.equal(a, b)


def test_timesteps_of_all_kinds(twin):
    theirs, mine = (
        kind.UNet2DConditionModel.from_pretrained(twin[1], subfolder="unet") for kind in (diffusers, dialect)
    )
    x, c = torch.full((2, 4, 8, 8), 0.5), torch.full((2, 77, 128), 0.1)
    for t in (7, 7.0, torch.tensor(7), torch.tensor([7, 500]), torch.tensor([7])):
        with torch.no_grad():
            assert torch.equal(mine(x, t, c).sample, theirs(x, t, c).sample)


def test_schedulers_take_overrides_and_each_others_settings(twin):
    for name in ("DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler"):
        theirs, mine = (
            getattr(library, name).from_pretrained(twin[1], subfolder="scheduler", rescale_betas_zero_snr=True)
            for library in (diffusers, dialect)
        )
        assert type(mine).__name__ == name and torch.equal(mine.alphas_cumprod, theirs.alphas_cumprod)
        assert mine.config.rescale_betas_zero_snr is True


def test_outputs_and_configs_are_read_in_every_way(text_encoders):
    mine = text_encoders[1]
    out = mine(torch.tensor([[49406, 49407]]))
    assert out[0] is out["last_hidden_state"] is out.last_hidden_state and out[:2] == out.to_tuple()
    assert mine.config["hidden_size"] == mine.config.hidden_size == mine.hidden_size == 128
    assert pickle.loads(pickle.dumps(mine.config)) == mine.config
    with pytest.raises(TypeError, match="read-only"):
        mine.config.hidden_size = 1


# ------------------------------------------------ the hub


@pytest.fixture
def hub(twin, monkeypatch):
    """A hub with one repository, the twin's folder; what is asked of it is noted."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        if name != "somebody/twin":
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        return str(twin[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_small_things_come_without_the_weights(hub):
    assert dialect.DDIMScheduler.from_pretrained("somebody/twin", subfolder="scheduler").config.steps_offset == 1
    assert dialect.CLIPTokenizer.from_pretrained("somebody/twin", subfolder="tokenizer").model_max_length == 77
    assert hub == [("somebody/twin", ("scheduler/*",)), ("somebody/twin", ("tokenizer/*",))]
    with pytest.raises(ValueError, match="nobody/here"):
        dialect.DDPMScheduler.from_pretrained("nobody/here", subfolder="scheduler")
    with pytest.raises(ValueError, match="stable-diffusion-v1-5/stable-diffusion-v1-5"):
        dialect.CLIPTokenizer.from_pretrained("sd15", subfolder="tokenizer")
    assert dialect.DDIMScheduler.from_pretrained("emoji", subfolder="scheduler").config.beta_end == 0.012
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        dialect.CLIPTokenizer.from_pretrained("no/such/folder")


def test_importing_it_needs_neither_reference():
    import subprocess

    program = "import sys, minisd.diffusers; sys.exit('transformers' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
