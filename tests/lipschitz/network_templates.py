"""Whole networks as their authors write them, for :mod:`random_networks`: input shape and source by name.

C, D, N stand for widths and sizes, K for a kernel, P for a padding, G for groups, A and A0 for activations (A may write
in place), SIGN for plus or minus.
"""

TEMPLATES: dict[str, tuple[str, str]] = {
    "LeNet": (
        "C, 8, 8",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(C, D, 3, padding=1)
        self.conv2 = nn.Conv2d(D, 4, 3)
        self.fc1 = nn.Linear(16, 6)
        self.fc2 = nn.Linear(6, 3)
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x))
        x = x.view(-1, self.num_flat_features(x))
        return self.fc2(F.relu(self.fc1(x)))
    def num_flat_features(self, x):
        num = 1
        for s in x.size()[1:]:
            num *= s
        return num
""",
    ),
    "multilayer perceptron": (
        "N, N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(N * N, 6), nn.Linear(6, 6), nn.Linear(6, 4)])
        self.act = A
        self.drop = nn.Dropout(0.5)
    def forward(self, x):
        x = torch.flatten(x, 1)
        for layer in self.layers[:-1]:
            x = self.drop(self.act(layer(x)))
        return self.layers[-1](x)
""",
    ),
    "basic blocks": (
        "C, 6, 6",
        """
class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(C, D, 1)
        self.layer1 = nn.Sequential(BasicBlock(D, D), BasicBlock(D, D))
        self.layer2 = BasicBlock(D, 4, 2)
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(4, 3)
    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(self.pool(x).flatten(1))
""",
    ),
    "bottleneck": (
        "C, 4, 4",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(C, D, 1)
        self.conv2 = nn.Conv2d(D, D, 3, padding=1)
        self.conv3 = nn.Conv2d(D, C, 1)
        self.act = A
    def forward(self, x):
        out = self.conv1(x)
        out = self.act(out)
        out = self.conv2(out)
        out = self.act(out)
        out = self.conv3(out)
        return out + x
""",
    ),
    "pre-activation": (
        "C, 5, 5",
        """
class PreAct(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(C), nn.BatchNorm2d(D)
        self.conv1, self.conv2 = nn.Conv2d(C, D, 3, padding=1), nn.Conv2d(D, C, 3, padding=1)
    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + x
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[PreAct() for _ in range(2)])
    def forward(self, x):
        return F.adaptive_avg_pool2d(self.blocks(x), 1).squeeze(-1).squeeze(-1)
""",
    ),
    "dense block": (
        "C, 4, 4",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(C + 2 * i, 2, 3, padding=1) for i in range(3)])
        self.bns = nn.ModuleList([nn.BatchNorm2d(C + 2 * i) for i in range(3)])
        self.trans = nn.Conv2d(C + 6, 3, 1)
    def forward(self, x):
        features = [x]
        for conv, bn in zip(self.convs, self.bns):
            y = conv(F.relu(bn(torch.cat(features, 1)), inplace=True))
            features.append(y)
        return F.avg_pool2d(self.trans(torch.cat(features, 1)), 2)
""",
    ),
    "ShuffleNet unit": (
        "4, 4, 4",
        """
def channel_shuffle(x, groups):
    batchsize, num_channels, height, width = x.size()
    x = x.view(batchsize, groups, num_channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, -1, height, width)
class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 1, groups=2)
        self.b = nn.Conv2d(4, 4, K, padding=K // 2, groups=4)
        self.c = nn.Conv2d(4, 4, 1, groups=2)
    def forward(self, x):
        y = F.relu(self.a(x))
        y = channel_shuffle(y, 2)
        if K > 1:
            y = self.b(y)
        return x + self.c(y)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.unit = Unit()
    def forward(self, x):
        return self.unit(x)
""",
    ),
    "inverted residual": (
        "C, 4, 4",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        hidden = 2 * C
        self.use_res_connect = True
        self.conv = nn.Sequential(
            nn.Conv2d(C, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, C, 1, bias=False), nn.BatchNorm2d(C))
    def forward(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)
""",
    ),
    "VGG": (
        "C, 8, 8",
        """
def make_layers(cfg, c):
    layers = []
    for v in cfg:
        if v == "M":
            layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
        else:
            layers += [nn.Conv2d(c, v, kernel_size=3, padding=1), nn.BatchNorm2d(v), nn.ReLU(inplace=True)]
            c = v
    return nn.Sequential(*layers)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = make_layers([D, "M", 4, "M"], C)
        self.avgpool = nn.AdaptiveAvgPool2d((K, K))
        self.classifier = nn.Sequential(nn.Linear(4 * K * K, 5), nn.ReLU(True), nn.Dropout(), nn.Linear(5, 3))
    def forward(self, x):
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)
""",
    ),
    "fire module": (
        "C, 5, 5",
        """
class Fire(nn.Module):
    def __init__(self):
        super().__init__()
        self.squeeze = nn.Conv2d(C, 2, 1)
        self.expand1, self.expand3 = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
    def forward(self, x):
        x = self.act(self.squeeze(x))
        return torch.cat([self.act(self.expand1(x)), self.act(self.expand3(x))], 1)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fire = Fire()
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    def forward(self, x):
        return self.pool(self.fire(x))
""",
    ),
    "inception": (
        "C, 5, 5",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.b1 = nn.Conv2d(C, 2, 1)
        self.b2 = nn.Sequential(nn.Conv2d(C, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
        self.b4 = nn.Conv2d(C, 2, 1)
    def _forward(self, x):
        branch4 = self.b4(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return [self.b1(x), self.b2(x), branch4, pooled]
    def forward(self, x):
        outputs = self._forward(x)
        return torch.cat(outputs, 1)
""",
    ),
    "mixer": (
        "N, C",
        """
class Mlp(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(d, h), A0, nn.Linear(h, d)
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.channels = Mlp(N, D), Mlp(C, D)
    def forward(self, x):
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(x)
        return x.mean(dim=1)
""",
    ),
    "U-Net": (
        "C, 6, 6",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(C, 2, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
        self.up = nn.ConvTranspose2d(3, 2, 2, stride=2)
        self.last = nn.Conv2d(4, 2, 1)
        self.pool = nn.MaxPool2d(2)
    def forward(self, x):
        d1 = F.relu(self.down1(x))
        d2 = F.relu(self.down2(self.pool(d1)))
        up = self.up(d2)
        return self.last(torch.cat([up, d1], dim=1))
""",
    ),
    "autoencoder": (
        "1, N, N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(N * N, 6), A0, nn.Linear(6, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 6), A0, nn.Linear(6, N * N), nn.Sigmoid(), nn.Unflatten(1, (1, N, N)))
    def forward(self, x, return_code=False):
        code = self.encoder(x)
        if return_code:
            return code
        return self.decoder(code)
""",
    ),
    "Euler steps": (
        "C, 4, 4",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(C, D, K, padding=K // 2), nn.Tanh(), nn.Conv2d(D, C, K, padding=K // 2))
    def forward(self, x):
        for _ in range(3):
            x = x + 0.3 * self.f(x)
        return x
""",
    ),
    "momentum": (
        "N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(N, N), nn.Linear(N, N)
    def forward(self, x):
        v = self.f(x)
        x = x - 0.5 * v
        v = 0.9 * v + self.g(F.relu(x))
        x = x - v
        return x
""",
    ),
    "reversible": (
        "N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.split1, self.split2 = nn.Linear(N, 3), nn.Linear(N, 3)
        self.f, self.g = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    def forward(self, x):
        x1, x2 = self.split1(x), self.split2(x)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return torch.cat((y1, y2), dim=-1)
""",
    ),
    "normalised input": (
        "3, 5, 5",
        """
class Normalize(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
    def forward(self, input):
        return (input - self.mean) / self.std
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Normalize([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
        self.conv = nn.Conv2d(3, D, 3, padding=P)
        self.bn = nn.BatchNorm2d(D)
        self.act = A
    def forward(self, x):
        x = self.norm(x)
        x = self.act(self.bn(self.conv(x)))
        return x
""",
    ),
    "recurrent in space": (
        "N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.rec, self.out = nn.Linear(N, 5), nn.Linear(5, 5), nn.Linear(5, 2)
    def forward(self, x):
        h = torch.tanh(self.inp(x))
        for _ in range(3):
            h = torch.tanh(self.inp(x) + self.rec(h))
        return self.out(h)
""",
    ),
    "residual chain in one dimension": (
        "C, 8",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(C, C, 3, padding=2 ** i, dilation=2 ** i) for i in range(3))
        self.skip = nn.Conv1d(C, 2, 1)
    def forward(self, x):
        total = 0
        for conv in self.convs:
            out = F.leaky_relu(conv(x), 0.2)
            total = total + self.skip(out)
            x = x + out
        return F.max_pool1d(total, 2)
""",
    ),
    "projections": (
        "C, 4, 4",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.d, self.c = nn.Conv2d(C, D, 1), nn.Conv2d(C, D, 1)
        self.act = A0
    def forward(self, x):
        return self.d(x) + self.c(self.act(x))
""",
    ),
    "shuffled projection": (
        "4, 3, 3",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.d, self.c = nn.Conv2d(4, 4, 1, groups=G), nn.Conv2d(4, 4, 1)
    def forward(self, x):
        skip = self.d(x)
        skip = skip.view(-1, 2, 2, 3, 3).transpose(1, 2).reshape(-1, 4, 3, 3)
        return skip + self.c(F.relu(x))
""",
    ),
    "transposed branch": (
        "C, N, N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(C, D, 1), nn.Conv2d(D, C, 1)
        self.act = A0
    def forward(self, x):
        t = x.permute(0, 1, 3, 2)
        y = self.b(self.act(self.a(t)))
        return x SIGN y
""",
    ),
    "transposed skip": (
        "C, N, N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(C, D, 1), nn.Conv2d(D, C, 1)
        self.act = A0
    def forward(self, x):
        shortcut = x.transpose(-2, -1)
        x = self.act(self.a(x))
        x = self.b(x)
        x SIGN= shortcut
        return x
""",
    ),
    "vision on the last axis": (
        "C, 4, 4",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.dw = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.pw1, self.pw2 = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.gamma = nn.Parameter(0.5 * torch.ones(C))
    def forward(self, x):
        input = x
        x = self.dw(x)
        x = x.permute(0, 2, 3, 1)
        x = self.pw2(F.gelu(self.pw1(x)))
        x = self.gamma * x
        x = x.permute(0, 3, 1, 2)
        return input + x
""",
    ),
    "one layer on several sizes": (
        "C, 8, 8",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(C, C, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
    def forward(self, x):
        large = self.head(x)
        small = self.head(self.pool(x))
        return torch.cat([large.flatten(1), small.flatten(1), self.pool(small).flatten(1)], 1)
""",
    ),
    "volumes": (
        "C, 3, 4, 4",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(C, D, K, padding=K // 2)
        self.bn = nn.BatchNorm3d(D)
        self.pool = nn.MaxPool3d(2, stride=1)
    def forward(self, x):
        x = self.pool(F.relu_(self.bn(self.conv(x))))
        return x.mean([2, 3, 4])
""",
    ),
    "subtraction": (
        "N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(N, D), nn.Linear(D, N)
        self.act = A0
    def forward(self, x):
        y = self.a(x)
        y = self.act(y)
        y = self.b(y)
        return x - y if K == 1 else y - x
""",
    ),
    "averaged views": (
        "C, 4, 4",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(C, D, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * D, 3))
    def forward(self, x):
        return (self.backbone(x) + self.backbone(x.transpose(2, 3))) / 2
""",
    ),
    "upsampling by pools": (
        "C, 3, 3",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, D, 1)
        self.up = nn.AdaptiveAvgPool2d(7)
        self.fc = nn.Linear(49 * D, 2)
    def forward(self, x):
        return self.fc(self.up(F.relu(self.conv(x))).reshape(x.shape[0], -1))
""",
    ),
    "nested residuals": (
        "N",
        """
class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(N, N), nn.Linear(N, N)
    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Inner(), Inner()
    def forward(self, x):
        y = self.two(self.one(x))
        y += x
        return y
""",
    ),
    "without gradients": (
        "N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(N, 5), nn.Linear(5, 2)
    @torch.no_grad()
    def forward(self, x):
        return self.b(F.relu(self.a(x)))
""",
    ),
}

HOSTILE_TEMPLATES: dict[str, tuple[str, str]] = {
    "LoRA": (
        "N",
        """
class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(N, N)
        self.a, self.b = nn.Parameter(torch.randn(1, N)), nn.Parameter(torch.randn(N, 1))
        self.merged = False
    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.base.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return self
    def forward(self, x):
        return self.base(x) if self.merged else self.base(x) + F.linear(x, self.b @ self.a)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lora = LoRA()
    def forward(self, x):
        return self.lora(x)
""",
    ),
    "squeeze and excitation": (
        "C, 3, 3",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(C, C, 1)
    def forward(self, x):
        gate = torch.sigmoid(self.fc(F.adaptive_avg_pool2d(x, 1)))
        return x * gate
""",
    ),
    "attention": (
        "N, 3",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    def forward(self, x):
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return weights @ self.v(x)
""",
    ),
    "batch norm by hand": (
        "N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(N, N)
    def forward(self, x):
        x = self.fc(x)
        mean = x.mean(0, keepdim=True)
        return x - mean
""",
    ),
    "features in place": (
        "C, 4, 4",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)
    def forward(self, x):
        feats = []
        out = self.conv1(x)
        feats.append(out)
        out += F.relu(self.conv2(out))
        feats.append(out)
        return torch.cat(feats, 1)
""",
    ),
    "pre-activation in place": (
        "C, 4, 4",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(C, C, 1)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(C, C, 1)
    def forward(self, x):
        x = self.stem(x)
        residual = x
        out = self.conv1(self.relu(x))
        out += residual
        return out
""",
    ),
    "exponential average": (
        "N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(N, 3), nn.Linear(N, 3)
        self.register_buffer("steps", torch.zeros(()))
    def forward(self, x):
        self.steps += 1
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.student.parameters()):
                t.mul_(0.5).add_(5.0 * s, alpha=0.5)
        return self.teacher(x)
""",
    ),
    "gather of buffers": (
        "N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(N, N)
        self.register_buffer("out", torch.zeros(64, N))
    def forward(self, x):
        y = self.out[: x.size(0)]
        y.copy_(self.fc(x))
        y *= 3.0
        return y.clone()
""",
    ),
    "window written to": (
        "C, 4, 4",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)
    def forward(self, x):
        out = self.conv(x)
        inner = out[:, :, 1:3, 1:3]
        inner *= 5.0
        return out
""",
    ),
    "ghost batches": (
        "4",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
    def forward(self, x):
        return self.fc(x).view(4, -1).t().contiguous()
""",
    ),
    "frozen norm": (
        "C, 4, 4",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
    def train(self, mode=True):
        super().train(mode)
        self.bn.train()
        return self
    def forward(self, x):
        return self.bn(self.conv(x))
""",
    ),
    "straight through": (
        "N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(N, 4)
    def forward(self, x):
        y = self.fc(x)
        return y + (torch.round(y) - y).detach()
""",
    ),
    "function of its own": (
        "N",
        """
class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 3.0 * x
    @staticmethod
    def backward(ctx, grad):
        return grad
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(N, 4)
    def forward(self, x):
        return Tripled.apply(self.fc(x))
""",
    ),
    "initialised by its first batch": (
        "N",
        """
class ActNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(N)), nn.Parameter(torch.zeros(N))
        self.initialised = False
    def forward(self, x):
        if not self.initialised and torch.is_tensor(x):
            self.bias.data = -x.mean(0).detach().to(self.bias.dtype)
            self.scale.data = 1.0 / (1e-3 + x.detach().abs().mean(0).to(self.bias.dtype))
            self.initialised = True
        return (x + self.bias) * self.scale
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = ActNorm(), nn.Linear(N, 4)
    def forward(self, x):
        return self.fc(self.norm(x))
""",
    ),
    "kept from the first call": (
        "N",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.gain = nn.Linear(N, 4), None
    def forward(self, x):
        if self.gain is None:
            self.gain = 1.0 + x.shape[0]
        return self.gain * self.fc(x)
""",
    ),
    "activation that remembers": (
        "N",
        """
class Running(nn.ReLU):
    def __init__(self):
        super().__init__()
        self.largest = 1.0
    def __call__(self, x):
        y = super().__call__(x)
        return y * self.largest * 4.0
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(N, 4), Running(), nn.Linear(4, 2)
    def forward(self, x):
        return self.b(self.act(self.a(x)))
""",
    ),
}
