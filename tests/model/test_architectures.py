"""The building blocks of current architectures as torch code: export, clean and fold, against torch itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq_deploy.model import load_model


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Sequential:
    options.setdefault("padding", kernel // 2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = conv_bn(3, 8), conv_bn(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.merge, self.head = conv_bn(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        c = F.leaky_relu(self.norm(self.up(b)), 0.1)
        d = self.merge(torch.cat([a, c], 1))
        small = F.avg_pool2d(F.silu(d), 2)
        return self.head(F.interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False))


class SqueezeExcite(nn.Module):
    """MobileNetV3 and EfficientNet blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.expand, self.depth, self.project = conv_bn(8, 24, 1), conv_bn(24, 24, 5, groups=24), conv_bn(24, 8, 1)
        self.reduce, self.restore = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = F.silu(self.depth(F.hardswish(self.expand(x))))
        y = y * F.hardsigmoid(self.restore(F.relu(self.reduce(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.project(y)
        return self.head(x.mean((2, 3)))


class Shuffle(nn.Module):
    """ShuffleNetV2 units: channel split, shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = conv_bn(3, 8), conv_bn(4, 4, groups=4), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(2):
            a, b = x.chunk(2, 1)
            x = torch.cat([a, F.relu(self.branch(b))], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x.mean([2, 3]))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            conv_bn(3, 4, 1),
            conv_bn(3, 4, 3),
            nn.Sequential(nn.Conv2d(3, 4, (1, 7), padding=(0, 3)), nn.BatchNorm2d(4)),
        )
        self.after, self.head = nn.BatchNorm2d(15), nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        pool = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        x = torch.cat([F.relu(self.a(x)), F.relu(self.b(x)), F.relu(self.c(x)), pool], 1)
        x = F.max_pool2d(F.relu(self.after(x)), 3, stride=2, ceil_mode=True)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class Windows(nn.Module):
    """Swin: shifted windows, relative position bias, a mask with very large negative numbers."""

    def __init__(self, width: int = 16, heads: int = 2, window: int = 4) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.embed = nn.Conv2d(3, width, 2, stride=2)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(heads, window**2, window**2))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 7)
        mask = torch.zeros(4, window**2, window**2)
        mask[1:, : window**2 // 2, window**2 // 2 :] = float("-inf")
        self.register_buffer("mask", mask)

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1) + self.bias.unsqueeze(0)
        windows = self.mask.shape[0]
        scores = scores.view(b // windows, windows, self.heads, n, n) + self.mask.unsqueeze(1).unsqueeze(0)
        return self.proj((scores.view(-1, self.heads, n, n).softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        s = self.window
        y = torch.roll(self.norm1(x), (-s // 2, -s // 2), (1, 2))
        y = y.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        y = self.attend(y).view(-1, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + torch.roll(y, (s // 2, s // 2), (1, 2))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean((1, 2)))


class Attention(nn.Module):
    """A class token, position embedding and fused attention, as ViT has it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.token = nn.Conv2d(3, width, 4, stride=4), nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width))
        self.qkv, self.head = nn.Linear(width, 3 * width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return self.head(x[:, 0])


class PixelShuffle(nn.Module):
    """FSRCNN and ESPCN: PReLU, sub-pixel and transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(1, 8, 5, padding=2), nn.PReLU(8), nn.Conv2d(8, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(1, 1, 9, stride=2, padding=4, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.pixel_shuffle(self.b(self.act(self.a(x))), 2)) + F.interpolate(
            x, scale_factor=4, mode="nearest"
        )


class Detector(nn.Module):
    """A YOLO head: two scales, grids made in forward, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 8, stride=2), conv_bn(8, 8, stride=2), nn.Conv2d(8, 2 * 6, 1)

    def decode(self, x: Tensor, stride: int) -> Tensor:
        b, _, h, w = x.shape
        x = x.view(b, 2, 6, h, w).permute(0, 1, 3, 4, 2).sigmoid()
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack((columns, rows), -1).view(1, 1, h, w, 2).float()
        middle = (x[..., :2] * 2 - 0.5 + grid) * stride
        size = (x[..., 2:4] * 2) ** 2 * 16
        return torch.cat((middle - size / 2, middle + size / 2, x[..., 4:]), -1).view(b, -1, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = F.silu(self.a(x))
        b = F.silu(self.b(a))
        up = F.interpolate(b, scale_factor=2.0, mode="nearest")
        boxes = torch.cat([self.decode(self.head(b), 4), self.decode(self.head(a + up), 2)], 1)
        return boxes[..., :4], boxes[..., 4] * boxes[..., 5]


class Dense(nn.Module):
    """DenseNet: normalization in front of the convolution, after a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n1, self.c1 = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
        )
        self.n2, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)
        self.n3 = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.n2(torch.cat([x, self.c1(F.relu(self.n1(x)))], 1)))
        return self.n3(self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class PoolGrid(nn.Module):
    """Adaptive pooling to a grid, batch-dependent view(-1), squeeze, group norm, einsum, channel attention in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.eca, self.head = (
            conv_bn(3, 8),
            nn.GroupNorm(2, 8),
            nn.Conv1d(1, 1, 3, padding=1),
            nn.Linear(32, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(self.a(x)))
        weight = self.eca(x.mean((2, 3), keepdim=True).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        x = F.adaptive_avg_pool2d(x * weight.sigmoid().expand_as(x), 2)
        return torch.einsum("nc,oc->no", x.view(x.size(0), -1), self.head.weight) + self.head.bias


def made(build: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = build()
    for module in net.modules():  # statistics that folding cannot get right by accident
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias)
    return net.eval()


NETS = {  # shape, batch normalizations, those without a layer in front
    UNet: ((1, 3, 16, 16), 4, 0),
    SqueezeExcite: ((1, 3, 16, 16), 4, 0),
    Shuffle: ((1, 3, 8, 8), 3, 0),
    Inception: ((1, 3, 12, 12), 4, 1),
    Windows: ((1, 3, 16, 16), 0, 0),
    Attention: ((1, 3, 16, 16), 0, 0),
    PixelShuffle: ((1, 1, 10, 12), 0, 0),
    Detector: ((1, 3, 16, 16), 2, 0),
    Dense: ((1, 3, 8, 8), 3, 2),
    PoolGrid: ((1, 3, 8, 8), 1, 0),
}


@pytest.mark.parametrize("build", NETS, ids=lambda build: build.__name__)
def test_export_equals_torch(build, ort_run, relative_error):
    shape, norms, alone = NETS[build]
    net = made(build)
    model = load_model(net, input_shape=shape)
    assert model.dynamic_batch
    assert not model.notes
    assert len(model.batch_norms()) == norms
    assert sum(norm.conv is None for norm in model.batch_norms()) == alone
    operators = Counter(node.op_type for node in model.graph)
    assert not {"Cast", "CastLike", "ConstantOfShape", "Identity", "Constant", "Range"} & set(operators)
    if build is not Attention:
        assert not {"Shape", "Expand"} & set(operators)
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 3):
        x = torch.randn((batch, *shape[1:]), generator=generator)
        with torch.no_grad():
            wanted = net(x)
        wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
        for graph in (model.graph, model.folded().graph):
            for found, expected in zip(ort_run(graph, x.numpy()), wanted, strict=True):
                assert relative_error(found, expected.numpy()) < 1e-5


class Baked(nn.Module):
    """Code that turns the batch size into a Python number, so that no exporter can keep it open."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv_bn(3, 4), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        windows = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4, 16)
        batch = int(windows.shape[0] // 4)
        y = windows.mean(-1).view(batch, 4, 4)
        return self.head(y.reshape(batch, 2, 8)).flatten(1)


def test_batch_size_that_code_has_made_a_number(ort_run, relative_error):
    net = made(Baked)
    model = load_model(net, input_shape=(1, 3, 8, 8))
    assert model.dynamic_batch
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        wanted = net(x).numpy()
    assert relative_error(ort_run(model.graph, x.numpy())[0], wanted) < 1e-5


class Choosing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x - 1


def test_code_that_looks_at_the_data_is_refused_or_said():
    from zsq_deploy.errors import ModelError

    with pytest.raises(ModelError, match=r"cannot export|computes something else|control flow"):
        load_model(Choosing(), input_shape=(1, 3, 4, 4))


def test_the_module_is_left_as_it_was():
    net = made(Shuffle).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    load_model(net, input_shape=(1, 3, 8, 8))
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 4), nn.Linear(6, 4)

    def forward(self, image: Tensor, state: Tensor) -> dict[str, Tensor]:
        y = self.a(image) + self.b(state)[:, :, None, None]
        return {"map": y, "mean": y.mean((2, 3))}


def test_several_inputs_and_outputs(ort_run, relative_error):
    net = made(TwoInputs)
    model = load_model(net, input_shape={"image": (1, 3, 8, 8), "state": (1, 6)})
    assert [spec.name for spec in model.inputs] == ["image", "state"]
    assert [spec.shape for spec in model.inputs] == [(None, 3, 8, 8), (None, 6)]
    feeds = {"image": torch.randn(3, 3, 8, 8), "state": torch.randn(3, 6)}
    with torch.no_grad():
        wanted = list(net(**feeds).values())
    for found, expected in zip(ort_run(model.graph, {k: v.numpy() for k, v in feeds.items()}), wanted, strict=True):
        assert relative_error(found, expected.numpy()) < 1e-5
    from zsq_deploy.errors import UsageError

    with pytest.raises(UsageError, match="do not fit the network's forward"):
        load_model(net, input_shape={"picture": (1, 3, 8, 8)})
    assert np.isfinite(model.batch_norms()[0].scale).all()
