"""MoCo's training step in PyTorch, the peer of `moco-tf bench step --vs=torch`; TensorFlow is not imported.

Written from the papers (arXiv:1911.05722, Algorithm 1; arXiv:2003.04297), for one device. Modules have the names of the
reference's, so that what `moco-tf convert` writes in the layout "official" loads into `MoCo`.
"""

import copy
import re

import torch
from torch.nn import functional

from moco_tf.bench.timing import peak_mib, timed

PRODUCT = re.compile(r"conv|mm$")    # in the names of operations
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Block(torch.nn.Module):
    """A residual block: 3x3, 3x3 (basic), or 1x1, 3x3, 1x1 (bottleneck), the stride in the first 3x3."""

    def __init__(self, channels, planes, stride, bottleneck):
        super().__init__()
        kernels, widths = ((1, 3, 1), (planes, planes, 4 * planes)) if bottleneck else ((3, 3), (planes, planes))
        self.count, inputs = len(kernels), channels
        for i, (kernel, width) in enumerate(zip(kernels, widths)):
            own = stride if i == kernels.index(3) else 1
            setattr(self, f"conv{i + 1}", torch.nn.Conv2d(inputs, width, kernel, own, kernel // 2, bias=False))
            setattr(self, f"bn{i + 1}", torch.nn.BatchNorm2d(width))
            inputs = width
        self.relu = torch.nn.ReLU(inplace=True)
        self.downsample = torch.nn.Sequential(
            torch.nn.Conv2d(channels, inputs, 1, stride, bias=False),
            torch.nn.BatchNorm2d(inputs)) if stride > 1 or channels != inputs else None

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = self.relu(y) if i < self.count else y
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(torch.nn.Module):
    """(B, 3, S, S) images -> (B, dim): a residual network, and a head of these hidden widths, () for a linear one."""

    def __init__(self, depth, width, stem, hidden, dim):
        super().__init__()
        channels, bottleneck = round(64 * width), depth >= 50
        if stem == "cifar":
            self.conv1, self.maxpool = torch.nn.Conv2d(3, channels, 3, 1, 1, bias=False), torch.nn.Identity()
        else:
            self.conv1, self.maxpool = torch.nn.Conv2d(3, channels, 7, 2, 3, bias=False), torch.nn.MaxPool2d(3, 2, 1)
        self.bn1, self.relu = torch.nn.BatchNorm2d(channels), torch.nn.ReLU(inplace=True)
        for stage, blocks in enumerate(BLOCKS[depth]):
            planes, layer = round(64 * width * 2 ** stage), []
            for i in range(blocks):
                layer.append(Block(channels, planes, 2 if stage and not i else 1, bottleneck))
                channels = planes * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", torch.nn.Sequential(*layer))
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        head = []
        for wide in hidden:
            head += [torch.nn.Linear(channels, wide), torch.nn.ReLU(inplace=True)]
            channels = wide
        head.append(torch.nn.Linear(channels, dim))
        self.fc = torch.nn.Sequential(*head) if hidden else head[0]

    def forward(self, images):
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


class MoCo(torch.nn.Module):
    """Query encoder, momentum encoder and a queue of (C, K), the reference's layout; `step` trains one step."""

    def __init__(self, encoder, dim, queue_size, temperature, momentum):
        super().__init__()
        self.encoder_q, self.encoder_k = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", functional.normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.temperature, self.momentum = temperature, momentum

    def step(self, query_images, key_images, optimizer):
        """(B, 3, S, S) images of both views -> the loss, and how many negatives score above each positive, (B,)."""
        queries = functional.normalize(self.encoder_q(query_images).to(self.queue), dim=1)
        with torch.no_grad():
            for copied, parameter in zip(self.encoder_k.parameters(), self.encoder_q.parameters()):
                copied.mul_(self.momentum).add_(parameter, alpha=1 - self.momentum)
            keys = functional.normalize(self.encoder_k(key_images).to(self.queue), dim=1)
        positive = torch.einsum("nc,nc->n", queries, keys)[:, None]
        logits = torch.cat([positive, queries @ self.queue], dim=1) / self.temperature
        loss = functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
        rank = (logits.detach() > logits.detach()[:, :1]).sum(dim=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self.enqueue(keys)    # after the gradient, which needs the queue as it was: the reference copies it instead
        return loss.detach(), rank

    @torch.no_grad()
    def enqueue(self, keys):
        columns = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % self.queue.shape[1]
        self.queue[:, columns] = keys.T
        self.queue_ptr[0] = (self.queue_ptr[0] + len(keys)) % self.queue.shape[1]


def outside_products(function):
    """Of the time of all operations that a function runs on the CPU, the share outside convolutions and matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    seconds = {event.key: event.self_cpu_time_total for event in profile.key_averages() if event.key.startswith("aten::")}
    return 1 - sum(own for name, own in seconds.items() if PRODUCT.search(name)) / sum(seconds.values())


def training_step(settings, steps):
    """A case of `in_turns`: a turn is so many steps on made-up images, already normalised.

    Args:
        settings: encoder (arguments of `ResNet`), moco (the further ones of `MoCo`), optimizer (arguments of SGD),
            batch_size, size, device, precision ("float32" or "bfloat16") and threads.
        steps: in a turn; 0: as many as take about three seconds.
    """
    torch.set_num_threads(settings["threads"])
    torch.backends.cuda.matmul.allow_tf32 = True    # as TensorFlow does
    torch.manual_seed(0)
    device = torch.device(settings["device"])
    model = MoCo(ResNet(**settings["encoder"]), **settings["moco"]).to(device).train()
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), **settings["optimizer"])
    shape = (settings["batch_size"], 3, settings["size"], settings["size"])
    query, key = torch.randn(shape, device=device), torch.randn(shape, device=device)

    def take(count):
        for _ in range(count):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings["precision"] == "bfloat16"):
                loss, _ = model.step(query, key, optimizer)
        return loss.item()    # waits for an accelerator

    first = timed(lambda: take(1), units=1).wall_s
    take(1)
    steps = steps or max(1, round(3 / timed(lambda: take(1), units=1).wall_s))
    peak = torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == "cuda" else peak_mib()
    yield {"version": torch.__version__, "first_call_s": first, "steps": steps, "step_peak_mib": peak,
           "outside_products": outside_products(lambda: take(steps)) if device.type == "cpu" else None}
    while True:
        yield timed(lambda: take(steps), units=steps)
