"""PyTorch's answers to the problems of tests.parity.problems, and the PyTorch module that minunet.network.bridge means.

Everything is PyTorch's own: its functions, modules, autograd, optimiser and schedules. Where its conventions differ
from minunet's, a comment says what was done.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minunet.base.rng import DROPOUT, Key, random_uint16
from minunet.network.bridge import from_torch_names, to_torch_names
from minunet.ops.conv2d import output_size
from minunet.training.optim import norms_and_biases
from tests.parity.problems import Arrays, Problem, flat, options_of

torch.set_num_threads(1)


def solve(problem: Problem) -> Arrays:
    return SOLVERS[problem.kind](problem)


def to_nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def to_nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def numpy_of(tensor: Tensor) -> np.ndarray:
    return np.array(tensor.detach().numpy(), order="C")


# --- Ops and losses: NHWC in and out, PyTorch's own layout between ----------------------------------------------------


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int | str) -> Tensor:
    # PyTorch pads both sides alike; "same" may need one more at the bottom and right.
    rows = output_size(x.shape[1], weight.shape[0], stride, padding)[1]
    columns = output_size(x.shape[2], weight.shape[1], stride, padding)[1]
    padded = F.pad(to_nchw(x), (*columns, *rows))
    return to_nhwc(F.conv2d(padded, weight.permute(3, 2, 0, 1).contiguous(), bias, stride))


def conv_transpose2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int | str) -> Tensor:
    kernel = weight.permute(2, 3, 0, 1).contiguous()
    if padding != "same":
        return to_nhwc(F.conv_transpose2d(to_nchw(x), kernel, bias, stride, padding))
    # The whole result, then a crop to stride * size that drops more at the bottom and right. A kernel smaller than the
    # stride leaves the last rows to the bias alone: output_padding, which PyTorch wants below the stride.
    short = [max(stride - side, 0) for side in weight.shape[:2]]
    full = to_nhwc(F.conv_transpose2d(to_nchw(x), kernel, bias, stride, output_padding=short))
    top, left = (max(side - stride, 0) // 2 for side in weight.shape[:2])
    return full[:, top : top + stride * x.shape[1], left : left + stride * x.shape[2]]


def max_pool2d(x: Tensor, size: int) -> Tensor:
    return to_nhwc(F.max_pool2d(to_nchw(x), size))


def batch_norm2d(
    x: Tensor, gamma: Tensor, beta: Tensor, running_mean: Tensor, running_var: Tensor, training: bool, eps: float
) -> Tensor:
    mean, var = running_mean.clone(), running_var.clone()
    return to_nhwc(F.batch_norm(to_nchw(x), mean, var, gamma, beta, training, eps=eps))


def batch_statistics(x: Tensor) -> Arrays:
    """Mean and biased variance of the batch, as F.batch_norm finds them: its running ones, at momentum 1."""
    mean, var = torch.zeros_like(x[0, 0, 0]), torch.zeros_like(x[0, 0, 0])
    F.batch_norm(to_nchw(x), mean, var, training=True, momentum=1.0)
    n = x[..., 0].numel()
    return {"mean": numpy_of(mean), "var": numpy_of(var * ((n - 1) / n))}  # PyTorch keeps the unbiased one


def dropout(x: Tensor, rate: float, key: Key | None) -> Tensor:
    """With minunet's mask: PyTorch has no way to draw the same."""
    if key is None or rate == 0:
        return x * 1
    size = x[0].numel()
    draws = np.stack([random_uint16(key._replace(image=key.image + n), size) for n in range(len(x))])
    kept = torch.from_numpy(draws >= round(rate * 2**16)).reshape(x.shape)
    return torch.where(kept, x / (1 - rate), torch.zeros_like(x))


def dice_loss(probabilities: Tensor, target: Tensor, smooth: float, over: str) -> Tensor:
    axes = {"batch": (0, 1, 2, 3), "image": (1, 2, 3), "class": (0, 1, 2)}[over]
    overlap = (probabilities * target).sum(axes)
    dice = (2 * overlap + smooth) / (probabilities.sum(axes) + target.sum(axes) + smooth)
    return 1 - dice.mean()


def segmentation_loss(
    logits: Tensor, target: Tensor, dice_weight: float, bce_weight: float, smooth: float, over: str
) -> Tensor:
    dice = dice_loss(torch.sigmoid(logits), target, smooth, over)
    return dice_weight * dice + bce_weight * F.binary_cross_entropy_with_logits(logits, target)


def softmax_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """PyTorch's with probabilities for a target, which are 0 in all classes where a pixel is to be ignored.

    It averages over all pixels: so the sum is taken, and divided by the pixels that count.
    """
    total = F.cross_entropy(to_nchw(logits), to_nchw(target), reduction="sum")
    return total / target.sum().clamp(min=1)


def softmax_loss(
    logits: Tensor, target: Tensor, dice_weight: float, cross_entropy_weight: float, smooth: float
) -> Tensor:
    p = torch.softmax(logits, dim=3) * target.sum(dim=3, keepdim=True)
    dice = dice_loss(p[..., 1:], target[..., 1:], smooth, "class")
    return dice_weight * dice + cross_entropy_weight * softmax_cross_entropy(logits, target)


OPS: dict[str, Callable[..., Tensor]] = {
    "conv2d": conv2d,
    "conv_transpose2d": conv_transpose2d,
    "max_pool2d": max_pool2d,
    "batch_norm2d": batch_norm2d,
    "relu": lambda x: F.relu(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "dropout": dropout,
    "concat": lambda up, skip: torch.cat([up, skip], dim=3),
    "dice_loss": dice_loss,
    "bce_with_logits": lambda logits, target: F.binary_cross_entropy_with_logits(logits, target),
    "segmentation_loss": segmentation_loss,
    "softmax": lambda x: torch.softmax(x, dim=3),
    "softmax_cross_entropy": softmax_cross_entropy,
    "softmax_loss": softmax_loss,
}


def solve_op(problem: Problem) -> Arrays:
    name = problem.settings["op"]
    inputs = {key: torch.tensor(array, requires_grad=True) for key, array in problem.part("inputs").items()}
    options = {
        key: torch.tensor(value) if isinstance(value, np.ndarray) else value
        for key, value in options_of(problem).items()
    }
    y = OPS[name](**inputs, **options)
    y.backward(torch.tensor(problem.arrays["dy"]) if "dy" in problem.arrays else None)
    gradients = {key: numpy_of(tensor.grad) for key, tensor in inputs.items()}
    answer = {"y": numpy_of(y), **flat(gradients=gradients)}
    if name == "batch_norm2d" and options["training"]:
        answer |= flat(statistics=batch_statistics(inputs["x"].detach()))
    return answer


# --- The U-Net --------------------------------------------------------------------------------------------------------


class DoubleConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, conv_bias: bool, eps: float, momentum: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=conv_bias)
        self.norm1 = nn.BatchNorm2d(out_channels, eps=eps, momentum=1 - momentum)  # Keras' momentum
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=conv_bias)
        self.norm2 = nn.BatchNorm2d(out_channels, eps=eps, momentum=1 - momentum)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)))


class Up(DoubleConv):
    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, conv_bias: bool, eps: float, momentum: float
    ) -> None:
        super().__init__(2 * out_channels, out_channels, conv_bias, eps, momentum)
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel, stride=2, padding=0)

    def enlarge(self, x: Tensor) -> Tensor:
        """ "Same" of kernels 2 and 3: what is too much is the last row and column."""
        return self.up(x)[:, :, : 2 * x.shape[2], : 2 * x.shape[3]]


class TorchUNet(nn.Module):
    """minunet's UNet as one would write it in PyTorch, but for dropout, which takes minunet's masks."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: list[int],
        dropout: float,
        up_kernel: int,
        head_kernel: int,
        conv_bias: bool,
        momentum: float,
        batch_norm_eps: float = 1e-3,  # Keras'
    ) -> None:
        super().__init__()
        self.depth, self.rate = len(widths) - 1, dropout
        inputs = [in_channels, *widths]
        norms = batch_norm_eps, momentum
        for level in range(self.depth):
            setattr(self, f"down{level + 1}", DoubleConv(inputs[level], widths[level], conv_bias, *norms))
            up = Up(widths[level + 1], widths[level], up_kernel, conv_bias, *norms)
            setattr(self, f"up{level + 1}", up)
        self.bottleneck = DoubleConv(inputs[self.depth], widths[self.depth], conv_bias, *norms)
        self.head = nn.Conv2d(widths[0], out_channels, head_kernel, padding=head_kernel // 2)

    def drop(self, x: Tensor, index: int, key: Key | None) -> Tensor:
        layer_key = None if key is None or not self.training else key._replace(stream=DROPOUT + index)
        return to_nchw(dropout(to_nhwc(x), self.rate, layer_key))

    def forward(self, x: Tensor, key: Key | None = None) -> Tensor:
        skips = []
        for level in range(self.depth):
            x = getattr(self, f"down{level + 1}")(x)
            skips.append(x)
            x = self.drop(F.max_pool2d(x, 2), level, key)
        x = self.bottleneck(x)
        for level in reversed(range(self.depth)):
            up = getattr(self, f"up{level + 1}")
            x = torch.cat([up.enlarge(x), skips[level]], dim=1)
            x = up(self.drop(x, self.depth + level, key))
        return self.head(x)


def build(problem: Problem) -> TorchUNet:
    """The module of a problem, with its weights and running statistics, brought over by minunet.network.bridge."""
    dtype = torch.from_numpy(problem.arrays["x"]).dtype
    module = TorchUNet(**problem.settings["config"], momentum=problem.settings["momentum"]).to(dtype)
    state = to_torch_names(problem.part("weights"))
    module.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=True)
    return module


def parameters_of(module: nn.Module) -> Arrays:
    return from_torch_names({name: tensor.detach().numpy() for name, tensor in module.named_parameters()})


def running_of(module: TorchUNet, problem: Problem, updates: int) -> Arrays:
    """The running statistics, with the biased variance, as Keras and minunet average it.

    PyTorch averages the unbiased one, n / (n - 1) times the biased, for n values a channel. Whatever the batches
    were, after so many updates the old value still has the share momentum**updates, and the rest is theirs.
    """
    *_, n_images, height, width, _ = problem.arrays["x"].shape
    before = problem.part("weights")
    old_share = problem.settings["momentum"] ** updates
    running = from_torch_names({name: tensor.numpy() for name, tensor in module.named_buffers()})
    for name in (name for name in running if name.endswith("running_var")):
        found = re.match(r"(?:down|up)(\d+)", name)
        level = int(found[1]) - 1 if found else module.depth
        n = n_images * (height >> level) * (width >> level)
        old = old_share * before[name]
        running[name] = (old + (running[name] - old) * ((n - 1) / n)).astype(old.dtype)
    return running


def loss_of(settings: dict[str, Any], logits: Tensor, target: Tensor) -> Tensor:
    options = {"dice_weight": 1.0, "bce_weight": 1.0, "smooth": 1.0, "over": "batch", **settings["loss"]}
    return segmentation_loss(to_nhwc(logits), target, **options)


def solve_unet(problem: Problem) -> Arrays:
    settings, arrays = problem.settings, problem.arrays
    module = build(problem).train(settings["training"])
    x = torch.tensor(arrays["x"], requires_grad=True)
    logits = module(to_nchw(x), Key(*settings["key"]))
    loss = loss_of(settings, logits, torch.tensor(arrays["target"]))
    loss.backward()
    grads = from_torch_names({name: tensor.grad.numpy() for name, tensor in module.named_parameters()})
    answer = {"loss": numpy_of(loss), "logits": numpy_of(to_nhwc(logits))}
    answer |= flat(gradients={"x": numpy_of(x.grad), **grads})
    if settings["training"]:
        answer |= flat(running=running_of(module, problem, updates=1))
    return answer


# --- AdamW, and training ----------------------------------------------------------------------------------------------


class Optimizer:
    """PyTorch's AdamW with its own schedules: linear from peak / warmup_steps to the peak, then a cosine."""

    def __init__(self, parameters: dict[str, Tensor], no_decay: Any, settings: dict[str, Any]) -> None:
        options = {"betas": [0.9, 0.999], "eps": 1e-7, **settings["optimizer"]}
        decay = options.pop("weight_decay")
        options.pop("no_decay", None)
        groups = [
            {"params": [p for name, p in parameters.items() if name not in no_decay], "weight_decay": decay},
            {"params": [p for name, p in parameters.items() if name in no_decay], "weight_decay": 0.0},
        ]
        peak, steps = settings["schedule"]["peak"], settings["steps"]
        warmup, final = settings["schedule"].get("warmup_steps", 0), settings["schedule"].get("final", 0.0)
        self.parameters, self.clip = parameters, settings["clip"]
        self.adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=peak, **options)
        # The factor of step k is (k + 1) / warmup: from 1 / warmup to 1 in warmup - 1 further steps. With a warm-up of
        # one step or none, the peak is where it starts.
        schedulers = torch.optim.lr_scheduler
        self.schedule: Any = schedulers.CosineAnnealingLR(self.adamw, steps - warmup, final)
        if warmup > 0:
            start = schedulers.LinearLR(self.adamw, 1 / warmup, 1.0, max(warmup - 1, 1))
            if warmup == 1:
                start = schedulers.ConstantLR(self.adamw, 1.0, 1)
            self.schedule = schedulers.SequentialLR(self.adamw, [start, self.schedule], [warmup])

    def step(self) -> tuple[float, float]:
        """Clip, step, and move on in the schedule. Returns the learning rate of this step and the gradients' norm."""
        grads = [p.grad for p in self.parameters.values()]
        norm = torch.nn.utils.get_total_norm(grads)
        # clip_grad_norm_ would divide by norm + 1e-6. That is no rounding error, so it is the plain formula here.
        if norm > self.clip:
            for grad in grads:
                grad *= self.clip / norm
        rate = self.adamw.param_groups[0]["lr"]
        self.adamw.step()
        self.schedule.step()
        return rate, norm.item()


def solve_adamw(problem: Problem) -> Arrays:
    settings, gradients = problem.settings, problem.part("gradients")
    parameters = {name: torch.tensor(array, requires_grad=True) for name, array in problem.part("weights").items()}
    optimizer = Optimizer(parameters, settings["optimizer"].get("no_decay", []), settings)
    answer: Arrays = {}
    rates, norms = [], []
    for step in range(settings["steps"]):
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name][step])
        rate, norm = optimizer.step()
        rates.append(rate)
        norms.append(norm)
        if step + 1 in settings["snapshots"]:
            answer |= {f"weights/{step + 1}/{name}": numpy_of(p) for name, p in parameters.items()}
    for ours, theirs in (("first_moment", "exp_avg"), ("second_moment", "exp_avg_sq")):
        state = optimizer.adamw.state
        answer |= flat(**{ours: {name: numpy_of(state[p][theirs]) for name, p in parameters.items()}})
    return {**answer, "learning_rates": np.array(rates), "norms": np.array(norms)}


def solve_training(problem: Problem) -> Arrays:
    settings, arrays = problem.settings, problem.arrays
    module = build(problem).train()
    parameters = dict(module.named_parameters())
    # The parameters that do not decay are listed by minunet's names: the shift of a norm is a "bias" in PyTorch.
    ours = norms_and_biases(parameters_of(module))
    no_decay = set(to_torch_names({name: array for name, array in parameters_of(module).items() if name in ours}))
    optimizer = Optimizer(parameters, no_decay, settings)
    values = []
    for step, (x, target) in enumerate(zip(arrays["x"], arrays["target"], strict=True)):
        module.zero_grad()
        logits = module(to_nchw(torch.tensor(x)), Key(*settings["key"])._replace(step=step))
        loss = loss_of(settings, logits, torch.tensor(target))
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    running = running_of(module, problem, updates=len(values))
    state = to_torch_names(running)  # for the last answer: inference with the biased variance
    module.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=False)
    with torch.no_grad():
        logits = module.eval()(to_nchw(torch.tensor(arrays["x"][0])))
    weights = parameters_of(module)
    return {"losses": np.array(values), "logits": numpy_of(to_nhwc(logits)), **flat(weights=weights, running=running)}


SOLVERS: dict[str, Callable[[Problem], Arrays]] = {
    "op": solve_op,
    "unet": solve_unet,
    "adamw": solve_adamw,
    "training": solve_training,
}
