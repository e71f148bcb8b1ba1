"""Class-conditional training: a UNet2DModel with a table of classes, and one whose classes come in as channels."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

CLASSES, PICTURES, BATCH = 10, 512, 64
SMALL = {
    "sample_size": 8,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}


class ChannelConditional(nn.Module):
    """A class as extra channels beside the picture."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 3)
        self.unet = UNet2DModel(in_channels=4, **SMALL)

    def forward(self, x, t, labels):
        channels = self.embedding(labels)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.unet(torch.cat([x, channels], dim=1), t).sample


def main(folder):
    """The loss curves of one epoch, and what the models then say."""
    torch.manual_seed(1)
    table = UNet2DModel(
        **SMALL,
        in_channels=1,
        attention_head_dim=8,
        num_class_embeds=CLASSES,
        dropout=0.1,
        resnet_time_scale_shift="scale_shift",
    )
    table.train()
    found = {f"table {name}": value for name, value in epoch(table).items()}
    found |= {f"channels {name}": value for name, value in epoch(ChannelConditional()).items()}
    return found


def epoch(model):
    """512 drawn pictures, each seen once."""
    labels = torch.arange(PICTURES) % CLASSES
    pictures = torch.randn(CLASSES, 1, 8, 8)[labels] + 0.1 * torch.randn(PICTURES, 1, 8, 8)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for first in range(0, PICTURES, BATCH):
        clean, classes = pictures[first : first + BATCH], labels[first : first + BATCH]
        noise, t = torch.randn_like(clean), torch.randint(0, 999, (len(clean),))
        predicted = model(scheduler.add_noise(clean, noise, t), t, classes)
        loss = F.mse_loss(predicted if isinstance(predicted, Tensor) else predicted.sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, **{name: weight.detach().clone() for name, weight in model.state_dict().items()}}
