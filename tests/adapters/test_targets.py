"""The forward table: complete, free of collisions, and the names are those that other projects pinned."""

import pytest

from minisd.adapters.targets import Target, names, table, targets
from minisd.config import SD15
from tests.adapters.makers import REFERENCE
from tests.unit.tiny import config_like

EVERY = list(targets(SD15))


def test_every_layer_that_others_change_is_there_and_no_other():
    for component, rows in REFERENCE.items():
        ours = {target.diffusers: list(target.shape) for target in EVERY if target.component == component}
        assert ours == {path: row["shape"] for path, row in rows.items()}
    assert len(EVERY) == 282 + 72


@pytest.mark.parametrize("dialect", ["kohya", "kohya_ldm", "peft", "old_diffusers"])
def test_pinned_names_are_found(dialect):
    found = table(EVERY)
    seen = 0
    for component, rows in REFERENCE.items():
        for path, row in rows.items():
            if dialect in row:
                target = found[row[dialect].removesuffix("_lora")]
                assert (target.component, target.diffusers) == (component, path)
                seen += 1
    assert seen == {"kohya": 354, "kohya_ldm": 282, "peft": 354, "old_diffusers": 128}[dialect]


def test_no_name_means_two_layers():
    """Counted without the table: every name of every layer, each once."""
    every = [name for target in EVERY for name in set(names(target))]
    assert len(every) == len(set(every)) == len(table(EVERY))


def test_a_collision_would_be_noticed():
    twins = [Target("unet", "a", "x.y_z", "p", (1, 1)), Target("unet", "b", "x_y.z", "q", (1, 1))]
    with pytest.raises(ValueError, match="lora_unet_x_y_z: means a and b"):
        table(twins)


def test_names_belong_to_the_layer_of_the_same_weight():
    """minisd's name leads to the module whose weight it is."""
    by_name = {target.weight: target for target in EVERY}
    target = by_name["unet", "down.4.attention.cross_attn.q.weight"]
    assert set(names(target)) >= {
        "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_q",
        "lora_unet_input_blocks_5_1_transformer_blocks_0_attn2_to_q",
        "unet.down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q",
        "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q",
        "down_blocks.1.attentions.1.transformer_blocks.0.attn2.processor.to_q",
    }
    text = by_name["text_encoder", "layers.3.feed_forward.expand.weight"]
    assert set(names(text)) >= {
        "lora_te_text_model_encoder_layers_3_mlp_fc1",
        "text_encoder.text_model.encoder.layers.3.mlp.fc1",
        "text_encoder.encoder.layers.3.mlp.fc1",
    }


def test_other_depths_have_other_layers():
    shallow = config_like(SD15.unet, resnets_per_level=1)
    few = list(targets(config_like(SD15, unet=shallow)))
    assert len(few) < len(EVERY) and len(table(few)) == sum(len(set(names(target))) for target in few)
