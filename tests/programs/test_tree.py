"""diffusers' module tree over minisd's layers: names, classes, order, hooks, new networks."""

import copy

import diffusers
import pytest
import torch
import transformers

import minisd.diffusers as dialect
from tests.parity.reference import NARROW

PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


@pytest.fixture(scope="module")
def pairs(twin):
    """Each network, theirs and ours, from the same files."""
    kinds = {name: getattr(transformers if name == "text_encoder" else diffusers, kind) for name, kind in PARTS.items()}
    return {
        name: (
            kinds[name].from_pretrained(twin[1], subfolder=name).eval(),
            getattr(dialect, kind).from_pretrained(twin[1], subfolder=name),
        )
        for name, kind in PARTS.items()
    }


def call(name: str, network) -> torch.Tensor:
    draw = torch.Generator().manual_seed(4)
    if name == "unet":
        text = torch.randn(2, 77, NARROW["text"], generator=draw)
        return network(torch.randn(2, 4, 9, 10, generator=draw), torch.tensor([981, 3]), text)[0]
    if name == "vae":
        return network(torch.randn(1, 3, 32, 40, generator=draw))[0]
    return network(torch.arange(2 * 77).reshape(2, 77))[0]


@pytest.mark.parametrize("name", PARTS)
def test_names_classes_and_order(pairs, name):
    theirs, mine = pairs[name]
    described = [[(path, type(module).__name__) for path, module in one.named_modules()] for one in (theirs, mine)]
    assert described[1] == described[0] and len(described[0]) > 150
    assert [path for path, _ in mine.named_parameters()] == [path for path, _ in theirs.named_parameters()]
    state, expected = mine.state_dict(), theirs.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[key], expected[key]) for key in expected)
    assert mine.num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_every_module_is_called_as_in_diffusers(pairs, name):
    """Hooks on all modules fire in the same order, on equal outputs."""
    found = []
    for network in pairs[name]:
        calls, handles = [], []
        for path, module in network.named_modules():

            def hook(module, args, output, path=path, calls=calls):
                first = output[0] if isinstance(output, tuple) else output
                calls.append((path, first if isinstance(first, torch.Tensor) else None))

            handles.append(module.register_forward_hook(hook))
        call(name, network)
        for handle in handles:
            handle.remove()
        found.append(calls)
    theirs, mine = found
    assert [path for path, _ in mine] == [path for path, _ in theirs]
    for (path, ours), (_, expected) in zip(mine, theirs, strict=True):
        assert ours is None or expected is None or torch.equal(ours, expected), path


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_weights_that_are_loaded_and_layers_that_are_replaced(pairs, name):
    theirs, mine = map(copy.deepcopy, pairs[name])
    path, layer = next(
        (path, one) for path, one in theirs.named_modules() if isinstance(one, torch.nn.LayerNorm | torch.nn.GroupNorm)
    )
    owner, _, leaf = path.rpartition(".")
    torch.manual_seed(0)
    state = {key: torch.randn_like(value) * 0.1 for key, value in theirs.state_dict().items()}
    before = call(name, mine)
    for network in (theirs, mine):
        network.load_state_dict(state)
        setattr(network.get_submodule(owner), leaf, torch.nn.Sequential(layer, torch.nn.Tanh()))
    after = call(name, mine)
    assert torch.equal(after, call(name, theirs)) and not torch.equal(after, before)
    with pytest.raises(RuntimeError, match="Missing key"):
        mine.load_state_dict({})
    assert torch.equal(call(name, pairs[name][1]), before), "a copy is another network"


@torch.no_grad()
def test_minisds_network_has_the_layers_of_the_tree(pairs):
    mine = copy.deepcopy(pairs["unet"][1])
    mine.conv_in = torch.nn.Conv2d(4, 32, 3, padding=1)
    assert mine.core.conv_in is mine.conv_in
    assert mine.core.down[0].resnet.conv1 is mine.down_blocks[0].resnets[0].conv1


def test_a_layer_for_more_channels_is_saved_and_loaded(pairs, tmp_path):
    """As programs make an inpainting model of a plain one."""
    results = []
    for index, network in enumerate(map(copy.deepcopy, pairs["unet"])):
        torch.manual_seed(0)
        network.conv_in = torch.nn.Conv2d(9, network.conv_in.out_channels, 3, padding=1)
        network.register_to_config(in_channels=9)
        network.save_pretrained(tmp_path / str(index))
        text = torch.ones(1, 77, NARROW["text"])
        results.append(network(torch.ones(1, 9, 8, 8), 5, text)[0])
        for library in (diffusers, dialect):
            again = library.UNet2DConditionModel.from_pretrained(tmp_path / str(index))
            results.append(again(torch.ones(1, 9, 8, 8), 5, text)[0])
            assert again.config.in_channels == 9
    made, loaded = results[::3], [one for index, one in enumerate(results) if index % 3]
    assert torch.equal(*made)  # weights in memory lie elsewhere than weights in files, and kernels round by that
    assert all(torch.equal(one, loaded[0]) for one in loaded) and torch.allclose(made[0], loaded[0], atol=1e-5)


def test_processors_that_do_not_fit(pairs):
    mine = pairs["unet"][1]
    processors = mine.attn_processors
    processors.popitem()
    with pytest.raises(ValueError, match="31 processors for 32 attention layers"):
        mine.set_attn_processor(processors)
    with pytest.raises(TypeError, match="processor=None"):
        mine.set_attn_processor(None)
    with pytest.warns(UserWarning, match="cross_attention_kwargs: colour not taken by AttnProcessor2_0"):
        mine(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, NARROW["text"]), cross_attention_kwargs={"colour": 1})


@torch.no_grad()
def test_processors_with_weights_masks_and_arguments(pairs):
    """A processor that is a module is a submodule, and gets the arguments that it takes."""
    results = []
    for network in map(copy.deepcopy, pairs["unet"]):
        library = diffusers if network.__module__.startswith("diffusers") else dialect
        plain = library.models.attention_processor.AttnProcessor()

        class Louder(torch.nn.Module):
            def __init__(self, plain=plain):
                super().__init__()
                self.gain, self.plain = torch.nn.Parameter(torch.tensor(1.5)), plain

            def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, gain=1.0):
                mask = torch.zeros(
                    len(hidden_states),
                    1,
                    (hidden_states if encoder_hidden_states is None else encoder_hidden_states).shape[1],
                )
                mask[:, :, -1] = -10000.0
                return self.plain(attn, hidden_states, encoder_hidden_states, mask) * self.gain * gain

            __call__ = torch.nn.Module.__call__

        network.set_attn_processor({name: Louder() for name in network.attn_processors})
        names = [name for name, _ in network.named_parameters() if name.endswith("processor.gain")]
        text = torch.ones(1, 77, NARROW["text"])
        results.append((names, network(torch.ones(1, 4, 8, 8), 5, text)[0]))
    assert results[0][0] == results[1][0] and len(results[0][0]) == 32
    assert torch.equal(results[0][1], results[1][1])


# ------------------------------------------------ networks from numbers

TALL, FLAT = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
UNETS = (
    {"block_out_channels": (32, 64), "layers_per_block": 1, "down_block_types": TALL, "up_block_types": FLAT},
    {  # eight heads do not divide the width of the level that has no attention
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
)
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
VAES = (
    {"block_out_channels": (32, 64), **LEVELS},
    {"block_out_channels": (4,), "norm_num_groups": 2, "layers_per_block": 2, "sample_size": 16},
)
NUMBERS = [
    *(("UNet2DConditionModel", {"sample_size": 8, "cross_attention_dim": 24, **one}) for one in UNETS),
    *(("AutoencoderKL", one) for one in VAES),
]


@pytest.mark.parametrize(("kind", "settings"), NUMBERS)
def test_a_seed_gives_the_same_new_network(kind, settings, tmp_path):
    """And training it, the same weights; and saving it, files that either reads."""
    trained = []
    for library in (diffusers, dialect):
        torch.manual_seed(11)
        network = getattr(library, kind)(**settings)
        network.enable_gradient_checkpointing()
        network.disable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        x = torch.randn(2, 4 if kind.startswith("UNet") else 3, 16, 16)
        for _ in range(2):
            args = (
                (x, torch.tensor([10, 500]), torch.ones(2, 5, settings["cross_attention_dim"]))
                if kind.startswith("UNet")
                else (x,)
            )
            loss = (network(*args)[0] - 1).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        trained.append(network)
        assert network.training and network.config.block_out_channels == settings["block_out_channels"]
    theirs, mine = trained
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for name, weight in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], weight), name
    mine.save_pretrained(tmp_path / "mine", variant="fp16")
    theirs.save_pretrained(tmp_path / "theirs")
    again = getattr(diffusers, kind).from_pretrained(tmp_path / "mine", variant="fp16")
    back = getattr(dialect, kind).from_pretrained(tmp_path / "theirs")
    for name, weight in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight) and torch.equal(back.state_dict()[name], weight), name
