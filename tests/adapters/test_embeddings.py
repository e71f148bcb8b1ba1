"""Textual inversion: ids and context equal diffusers' with the same file; every form; nothing stays behind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import minisd
from minisd.adapters.textual_inversion import open_embedding
from minisd.checkpoint.load import load_tokenizer
from minisd.checkpoint.tokenizer_files import from_json, to_json, write_folder
from minisd.tokenizer import CLIPTokenizer
from tests.unit.tiny import TOKENIZER, equal, tiny_model

PROMPTS = [
    "a photo of zork on a table, in red",
    "zork",
    "a<cat-toy>b and <Cat-Toy>.",
    "zorks zorkzork <CAT-TOY>",
    f"{'word ' * 73}zork end",  # three vectors where two places are left
    f"{'word ' * 80}zork",
    "nothing new",
]


@pytest.fixture
def files(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(5)
    save_file({"emb_params": torch.randn(3, 128, generator=generator)}, tmp_path / "zork.safetensors")
    save_file({"<Cat-Toy>": torch.randn(128, generator=generator)}, tmp_path / "learned_embeds.safetensors")
    save_file({"emb_params": torch.randn(1, 128, generator=generator).half()}, tmp_path / "half.safetensors")
    return tmp_path


@torch.no_grad()
def reference(pipeline, prompt: str):
    """diffusers' ids and context."""
    text = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
    ids = pipeline.tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return ids, pipeline.text_encoder(ids)[0]


@torch.no_grad()
def assert_same(pipeline, sd, prompts=PROMPTS):
    for prompt in prompts:
        ids, context = reference(pipeline, prompt)
        ours = sd.tokenizer([prompt])
        assert torch.equal(ours, ids), prompt
        assert torch.equal(sd.text_encoder(ours), context), prompt


@pytest.fixture
def taught(twin, files):
    """The same three files in diffusers' pipeline and in minisd's model."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(twin[1])
    sd = minisd.StableDiffusion.load(twin[1])
    for name, token in (("zork", "zork"), ("learned_embeds", None), ("half", "<half>")):
        pipeline.load_textual_inversion(files, weight_name=f"{name}.safetensors", token=token)
        words = sd.load_embedding(files / f"{name}.safetensors", None if name == "zork" else token)
        assert words == [token or "<Cat-Toy>"]
    return pipeline, sd


# ------------------------------------------------ parity


def test_ids_and_context_equal_diffusers(taught):
    assert_same(*taught)
    assert_same(*taught, prompts=["a <half> zork", "<HALF>"])


def test_a_whole_trajectory(taught):
    pipeline, sd = taught
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    theirs = pipeline("a zork in <cat-toy>", num_inference_steps=3, generator=generator, output_type="latent").images
    (*_, last) = sd.denoise("a zork in <cat-toy>", steps=3, seed=2)
    assert torch.equal(theirs, last.latents)
    (*_, plain) = sd.denoise("a in", steps=3, seed=2)
    assert not torch.equal(plain.latents, last.latents)


def test_a_word_of_several_vectors_in_another_case(taught):
    """All of its vectors, as in its own case. diffusers (0.42) takes only the first one then."""
    pipeline, sd = taught
    assert torch.equal(sd.tokenizer(["a ZORK"]), sd.tokenizer(["a zork"]))
    assert reference(pipeline, "a ZORK")[0].tolist() != reference(pipeline, "a zork")[0].tolist()


@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_saved_models_know_the_words(taught, tmp_path, layout):
    from diffusers import StableDiffusionPipeline

    pipeline, sd = taught
    target = tmp_path / ("saved.safetensors" if layout == "compvis" else "saved")
    sd.save(target, layout=layout)
    again = minisd.StableDiffusion.load(target)
    assert again.tokenizer.added == sd.tokenizer.added and equal(sd, again)
    assert_same(pipeline, again)
    if layout == "diffusers":
        theirs = StableDiffusionPipeline.from_pretrained(target)
        assert_same(theirs, sd)
        again.save(tmp_path / "twice")  # what was read can be written again
        assert_same(theirs, minisd.StableDiffusion.load(tmp_path / "twice"))


def test_folders_that_transformers_wrote(taught, tmp_path):
    """diffusers' own save of a taught pipeline: tokenizer.json, or vocab.json with added tokens beside it."""
    pipeline, _ = taught
    pipeline.save_pretrained(tmp_path / "theirs")
    assert_same(pipeline, minisd.StableDiffusion.load(tmp_path / "theirs"))


# ------------------------------------------------ forms


WIDTH = 64  # of the tiny model


def load(tensors: dict, tmp_path, token=None, name="my-word"):
    save_file(tensors, tmp_path / f"{name}.safetensors")
    sd = tiny_model()
    return sd, sd.load_embedding(tmp_path / f"{name}.safetensors", token)


@pytest.mark.parametrize("key", ["emb_params", "*", "clip_l"])
def test_tensors_without_a_name_are_called_like_the_file(tmp_path, key):
    sd, words = load({key: torch.ones(2, WIDTH)}, tmp_path)
    assert words == ["my-word"]
    assert sd.tokenizer.tokens("x my-word") == ["<|startoftext|>", "x</w>", "my-word", "my-word_1", "<|endoftext|>"]


def test_token_renames(tmp_path):
    assert load({"<old>": torch.ones(1, WIDTH)}, tmp_path, token="<new>")[1] == ["<new>"]


def test_several_words_in_one_file(tmp_path):
    sd, words = load({"<one>": torch.ones(WIDTH), "<two>": 2 * torch.ones(2, WIDTH)}, tmp_path)
    assert sorted(words) == ["<one>", "<two>"]
    rows = sd.text_encoder.token_embedding(sd.tokenizer(["<two><one>"])[0, 1:4])
    assert rows[:, 0].tolist() == [2.0, 2.0, 1.0]
    with pytest.raises(ValueError, match=r"holds 2 words \(<one>, <two>\): token= can name only one"):
        load({"<one>": torch.ones(WIDTH), "<two>": torch.ones(WIDTH)}, tmp_path, token="<x>")


def test_a_tensor_in_the_place_of_a_file():
    sd = tiny_model()
    assert sd.load_embedding(torch.ones(WIDTH), "<x>") == ["<x>"]
    with pytest.raises(ValueError, match="a tensor has no name: give token="):
        sd.load_embedding(torch.ones(WIDTH))
    with pytest.raises(minisd.CheckpointError, match="the tensor holds NaN or infinite numbers"):
        sd.load_embedding(torch.full((WIDTH,), float("nan")), "<y>")
    assert list(sd.adapters.embeddings) == ["<x>"]


def test_words_work_in_every_place_where_prompts_do(tmp_path):
    from minisd.tasks import weighted_context

    sd, _ = load({"emb_params": torch.ones(2, WIDTH)}, tmp_path)
    plain = sd.encode_prompt(["a red my-word cat"], None)
    assert not torch.equal(plain, sd.encode_prompt(["a red cat"], None))
    weighted = weighted_context(sd, "a red (my-word:1.5) cat")
    ratio = (weighted / plain)[0, :, 0].tolist()
    assert ratio[1:3] == pytest.approx(ratio[5:7], rel=1e-4)
    assert ratio[3:5] == pytest.approx([1.5 * ratio[1]] * 2, rel=1e-4)  # both vectors of the word


def test_words_that_begin_alike_are_spelt_out():
    """The longest one counts; what has several vectors is written as all of them."""
    sd = tiny_model()
    sd.load_embedding(torch.ones(2, WIDTH), "<x>")
    sd.load_embedding(torch.ones(2, WIDTH), "<x>y")
    assert sd.tokenizer.spelt_out("a <x>yz <X> <x>_1") == "a <x>y <x>y_1z <X> <x>_1 <x>_1"


def test_words_of_a_model_that_has_some_already_known(tmp_path):
    """A saved model's words stay words when more are loaded, and when those leave."""
    sd, _ = load({"<one>": torch.ones(WIDTH)}, tmp_path)
    sd.save(tmp_path / "taught")
    again = minisd.StableDiffusion.load(tmp_path / "taught")
    ids = again.tokenizer(["a <one>"])
    again.load_embedding(torch.ones(WIDTH), "<two>")
    assert torch.equal(again.tokenizer(["a <one>"]), ids) and again.tokenizer.added == ("<one>", "<two>")
    again.unload_embedding()
    assert torch.equal(again.tokenizer(["a <one>"]), ids) and again.tokenizer.added == ("<one>",)


# ------------------------------------------------ unloading


def test_unloading_restores_the_very_objects(tmp_path):
    sd = tiny_model()
    tokenizer, table, config = sd.tokenizer, sd.text_encoder.token_embedding.weight, sd.config
    sd.load_embedding(torch.ones(WIDTH), "<one>")
    sd.load_embedding(2 * torch.ones(2, WIDTH), "<two>")
    sd.load_embedding(3 * torch.ones(WIDTH), "<three>")
    assert len(sd.text_encoder.token_embedding.weight) == sd.config.text_encoder.vocabulary == len(table) + 4
    ids = sd.tokenizer(["<one> <two> <three>"])
    assert sd.text_encoder.token_embedding(ids[0, 1:5])[:, 0].tolist() == [1.0, 2.0, 2.0, 3.0]
    sd.unload_embedding("<two>")
    assert list(sd.adapters.embeddings) == ["<one>", "<three>"]
    ids = sd.tokenizer(["<one> <three>"])
    assert sd.text_encoder.token_embedding(ids[0, 1:3])[:, 0].tolist() == [1.0, 3.0]
    with pytest.raises(ValueError, match=r"'<two>': is not loaded \(<one>, <three>\)"):
        sd.unload_embedding("<two>")
    sd.unload_embedding()
    assert sd.tokenizer is tokenizer and sd.text_encoder.token_embedding.weight is table
    assert sd.config == config and sd.text_encoder.token_embedding.num_embeddings == len(table)
    sd.unload_embedding()  # of nothing: nothing happens


def test_the_vocabulary_that_all_models_share_is_left_alone():
    """Two models of CLIP's vocabulary have one tokenizer object."""
    shared = CLIPTokenizer.clip()
    before = shared(["a <x>"])
    sd = tiny_model()
    sd.tokenizer = shared
    sd.load_embedding(torch.ones(WIDTH), "<x>")
    assert torch.equal(shared(["a <x>"]), before) and not torch.equal(sd.tokenizer(["a <x>"]), before)


def test_an_embedding_and_a_lora_do_not_meet(tmp_path):
    from tests.adapters.makers import lora, write

    sd = tiny_model()
    path = write(tmp_path / "a.safetensors", lora(sd.config, only="text_encoder"))
    plain = sd.encode_prompt(["red"], None)
    sd.load_lora(path)
    with_lora = sd.encode_prompt(["red"], None)
    sd.load_embedding(torch.ones(WIDTH), "<x>")
    assert torch.equal(sd.encode_prompt(["red"], None), with_lora)
    sd.unload_lora()
    assert torch.equal(sd.encode_prompt(["red"], None), plain)


# ------------------------------------------------ what does not fit


BAD = {
    "SD 2": ({"emb_params": torch.zeros(2, 1024)}, "is 1024 wide .it is for SD 2.x.: this model's .* is 64 wide"),
    "SDXL": ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "is an embedding for SDXL"),
    "SD 1.5 for the small model": ({"<x>": torch.zeros(768)}, "it is for SD 1.x"),
    "three axes": ({"<x>": torch.zeros(1, 1, 64)}, "1 to 75 vectors"),
    "no vectors": ({"<x>": torch.zeros(0, 64)}, "1 to 75 vectors"),
    "too many": ({"<x>": torch.zeros(76, 64)}, "1 to 75 vectors"),
    "integers": ({"<x>": torch.zeros(1, 64, dtype=torch.int32)}, "has the dtype I32"),
    "NaN": ({"<x>": torch.full((2, 64), float("nan"))}, "holds NaN or infinite numbers"),
    "infinity in float16": ({"<x>": torch.full((64,), float("inf")).half()}, "holds NaN or infinite numbers"),
    "nothing": ({}, "holds no tensors"),
    "a LoRA": ({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, "is a LoRA: .*; an embedding was expected"),
}


@pytest.mark.parametrize(("tensors", "message"), BAD.values(), ids=BAD)
def test_what_is_no_embedding_for_this_model(tmp_path, tensors, message):
    sd = tiny_model()
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(minisd.CheckpointError, match=f"^{tmp_path}/bad.safetensors: .*{message}"):
        sd.load_embedding(tmp_path / "bad.safetensors")
    assert sd.adapters.embeddings == {} and sd.tokenizer is TOKENIZER


NO_WORDS = {
    "<|endoftext|>": "is in the vocabulary already",
    "<|ENDOFTEXT|>": "is in the vocabulary already",
    "red</w>": "'</w>' marks the end of a word",
    "new</w>": "'</w>' marks the end of a word",
    "": "a word cannot be empty",
    " <x>": "spaces around it or in it",
    "<x>\n": "spaces around it or in it",
    "a  b": "spaces around it or in it",
    "a cat": "spaces around it or in it",
    "a\u3000cat": "spaces around it or in it",
    "\ud800": "is not valid Unicode text",
    "cat\udfff": "is not valid Unicode text",
}


@pytest.mark.parametrize(("token", "message"), NO_WORDS.items(), ids=ascii)
def test_names_that_cannot_be_words(tmp_path, token, message):
    """Of a tensor, of a file, and of what stands in the file: one clear sentence."""
    sd = tiny_model()
    path = tmp_path / "fine.safetensors"
    save_file({"emb_params": torch.ones(2, WIDTH)}, path)
    for source in (torch.ones(WIDTH), path):
        with pytest.raises(ValueError, match=message) as caught:
            sd.load_embedding(source, token)
        assert str(caught.value).startswith(f"token={token!r}: ") and str(caught.value).isprintable()
    assert sd.adapters.embeddings == {} and sd.tokenizer is TOKENIZER


def test_files_whose_own_names_are_no_words(tmp_path):
    """token= is the way out."""
    for tensors, name in (({"a cat": torch.ones(WIDTH)}, "x"), ({"emb_params": torch.ones(WIDTH)}, "a cat")):
        with pytest.raises(ValueError, match=r"token='a cat': .*in it; choose a name with token="):
            load(tensors, tmp_path, name=name)
        assert load(tensors, tmp_path, name=name, token="<cat>")[1] == ["<cat>"]


def test_names_that_are_taken():
    sd = tiny_model()
    sd.load_embedding(torch.ones(3, WIDTH), "<x>")
    for token in ("<x>", "<X>", "<x>_1"):
        with pytest.raises(ValueError, match="already"):
            sd.load_embedding(torch.ones(WIDTH), token)
    assert list(sd.adapters.embeddings) == ["<x>"]


def test_pickles_are_refused_with_the_way_out(tmp_path):
    sd = tiny_model()
    torch.save({"string_to_param": {"*": torch.ones(1, 64)}, "name": "x"}, tmp_path / "style.pt")
    with pytest.raises(minisd.CheckpointError, match=r"style\.pt: .*minisd convert --from-pickle style\.pt"):
        sd.load_embedding(tmp_path / "style.pt")
    with pytest.raises(FileNotFoundError):
        sd.load_embedding(tmp_path / "nowhere.pt")


OLD_FORMS = {
    "AUTOMATIC1111": lambda t: {"string_to_token": {"*": 265}, "string_to_param": {"*": t}, "name": "zork", "step": 9},
    "the paper's": lambda t: {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(t)}),
    },
    "diffusers": lambda t: {"zork": t},
    "bare": lambda t: t,
}


@pytest.mark.parametrize("form", OLD_FORMS.values(), ids=OLD_FORMS)
def test_the_door_for_pickles(tmp_path, form):
    """Old forms become safetensors, of SD 1.5's width here; nothing in the pickle runs."""
    from minisd.lab.weights.convert import convert

    vectors = torch.randn(2, 768, generator=torch.Generator().manual_seed(8))
    torch.save(form(vectors), tmp_path / "zork.pt")
    target = convert(tmp_path / "zork.pt", tmp_path / "zork.safetensors", from_pickle=True)
    ((word, found),) = open_embedding(target, None, 768).items()
    assert word == "zork" and torch.equal(found, vectors)
    with pytest.raises(ValueError, match=r"choose a name in \.safetensors"):
        convert(tmp_path / "zork.pt", tmp_path / "folder", from_pickle=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zork.pt", "zork.safetensors"]


def test_loras_come_through_the_door_too(tmp_path):
    from minisd.lab.weights.convert import convert
    from tests.adapters.makers import lora

    sd = tiny_model()
    torch.save(lora(sd.config, "old_diffusers"), tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(minisd.CheckpointError, match="pickle"):
        sd.load_lora(tmp_path / "pytorch_lora_weights.bin")
    target = convert(tmp_path / "pytorch_lora_weights.bin", tmp_path / "lora.safetensors", from_pickle=True)
    assert len(sd.load_lora(target).changes) == 128 + 8


# ------------------------------------------------ tokenizers with added tokens in files


def test_added_tokens_in_metadata_and_folders(tmp_path):
    taught = CLIPTokenizer(
        {**TOKENIZER.vocabulary, "<x>": 520, "<x>_1": 521},
        TOKENIZER.merges,
        pad_token=TOKENIZER.pad_token,
        context_length=77,
        added=["<x>", "<x>_1"],
    )
    write_folder(taught, tmp_path / "folder")
    for again in (load_tokenizer(tmp_path / "folder"), CLIPTokenizer(**vars(from_json(to_json(taught))))):
        assert again.added == taught.added and again.vocabulary == taught.vocabulary
        assert again(["a <x>"])[0, 1:5].tolist()[1:3] == [520, 521]
    assert "<x>" not in json.loads((tmp_path / "folder" / "vocab.json").read_text())


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", ["<x>"]),
        ("added_tokens.json", {"<x>": "many"}),
        ("added_tokens.json", {"": 520}),
        ("added_tokens.json", {"<x>": 3}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"one": {"content": "<x>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"520": {}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"520": {"content": 7}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    ],
)
def test_broken_added_tokens(tmp_path, file, content):
    write_folder(TOKENIZER, tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(minisd.CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("added", [["<y>"], [7], "x", 5, {"a": 1}])
def test_broken_added_tokens_in_metadata(added):
    stored = json.loads(to_json(TOKENIZER)) | {"added": added}
    with pytest.raises(minisd.CheckpointError):
        from_json(json.dumps(stored))


@pytest.mark.parametrize("names", [("hero", "hero_1"), ("hero_1", "hero"), ("Hero_1", "hERO")])
def test_words_that_would_mean_another_too(names):
    """Tokens belong together by their names alone, in files and in diffusers: the second word is refused by name."""
    sd = tiny_model()
    vector = torch.randn(1, sd.config.text_encoder.width)
    sd.load_embedding(vector, names[0])
    before = sd.tokenizer
    with pytest.raises(ValueError, match=r"(?i)token='hero': in prompts it would mean 'hero_1' too"):
        sd.load_embedding(vector, names[1])
    assert sd.tokenizer is before
    sd.load_embedding(vector, "hero_2")  # behind a gap: it belongs to nothing
    if names[0] == "hero":
        assert sd.tokenizer.tokens("hero")[1:-1] == ["hero"]


def test_words_of_a_file_that_would_mean_each_other(tmp_path):
    sd = tiny_model()
    width = sd.config.text_encoder.width
    save_file({"cat": torch.randn(2, width), "cat_2": torch.randn(1, width)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="token='cat': in prompts it would mean 'cat_2' too"):
        sd.load_embedding(tmp_path / "a.safetensors")
    save_file({"cat": torch.randn(2, width), "dog": torch.randn(1, width)}, tmp_path / "b.safetensors")
    assert sorted(sd.load_embedding(tmp_path / "b.safetensors")) == ["cat", "dog"]
