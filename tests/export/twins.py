"""The papers' networks in PyTorch, with the attributes of the references' modules, to compare with. Needs `torch`."""

import torch


class Block(torch.nn.Module):
    """A residual block with the attributes of torchvision's, basic or bottleneck by `kernels`."""

    def __init__(self, inputs, widths, kernels, stride, groups):
        super().__init__()
        self.depth = len(kernels)
        strided = kernels.index(3)
        for i, kernel in enumerate(kernels):
            conv = torch.nn.Conv2d(
                ([inputs] + widths)[i], widths[i], kernel, stride if i == strided else 1, kernel // 2,
                groups=groups if kernel == 3 and len(kernels) == 3 else 1, bias=False)
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"bn{i + 1}", torch.nn.BatchNorm2d(widths[i]))
        self.downsample = None
        if stride > 1 or inputs != widths[-1]:
            self.downsample = torch.nn.Sequential(
                torch.nn.Conv2d(inputs, widths[-1], 1, stride, bias=False), torch.nn.BatchNorm2d(widths[-1]))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = torch.relu(y) if i < self.depth else y
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(torch.nn.Module):
    """The network of the papers, called like torchvision's."""

    def __init__(self, block, layers, num_classes=1000, groups=1, width_per_group=64, width=1, inputs=3):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(inputs, 64, 7, 2, 3, bias=False), torch.nn.BatchNorm2d(64)
        self.maxpool = torch.nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, blocks in enumerate(layers):
            planes = int(64 * width) * 2 ** stage
            inner = planes * width_per_group // 64 * groups
            widths, kernels = ([planes] * 2, [3, 3]) if block == "basic" else ([inner, inner, 4 * planes], [1, 3, 1])
            parts = []
            for i in range(blocks):
                parts.append(Block(channels, widths, kernels, 2 if stage and not i else 1, groups))
                channels = widths[-1]
            setattr(self, f"layer{stage + 1}", torch.nn.Sequential(*parts))
        self.fc = torch.nn.Linear(channels, num_classes)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


class HalfAlexNet(torch.nn.Module):
    """CMC's AlexNet for one view, with the attributes of its code."""

    def __init__(self, inputs, dim=128):
        super().__init__()
        blocks = [(inputs, 48, 11, 4, 2), (48, 128, 5, 1, 2), (128, 192, 3, 1, 1), (192, 192, 3, 1, 1),
                  (192, 128, 3, 1, 1)]
        for i, (channels, filters, kernel, stride, padding) in enumerate(blocks, 1):
            parts = [torch.nn.Conv2d(channels, filters, kernel, stride, padding, bias=False),
                     torch.nn.BatchNorm2d(filters), torch.nn.ReLU()]
            parts += [torch.nn.MaxPool2d(3, 2)] if i in (1, 2, 5) else []
            setattr(self, f"conv_block_{i}", torch.nn.Sequential(*parts))
        for i, width in ((6, 128 * 36), (7, 2048)):
            parts = [torch.nn.Linear(width, 2048), torch.nn.BatchNorm1d(2048), torch.nn.ReLU()]
            setattr(self, f"fc{i}", torch.nn.Sequential(*parts))
        self.fc8 = torch.nn.Sequential(torch.nn.Linear(2048, dim))

    def forward(self, x):
        for i in range(1, 6):
            x = getattr(self, f"conv_block_{i}")(x)
        return self.fc8(self.fc7(self.fc6(x.flatten(1))))


def spread(module):
    """Gives vectors and statistics values of their own: (0, 1) would hide a mix-up."""
    generator = torch.Generator().manual_seed(0)
    for value in module.state_dict().values():
        if value.dtype == torch.float32 and value.ndim == 1:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
