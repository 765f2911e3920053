"""A small U-Net learns one slice by heart, until its Dice exceeds 0.95.

    python examples/overfit_one_slice.py [picture.png]

A network that cannot learn one image will not learn a thousand. So this is the first experiment with a new network, a
new loss or new data, and the first thing to go back to when a training does not work. It shows that the
gradients flow and the optimiser walks downhill. It shows nothing about any other image.
"""

import sys

from minunet import AdamW, SegmentationLoss, UNet
from minunet.data import phantom
from minunet.data.normalize import Normalization, apply
from minunet.results.plots import plot_predictions
from minunet.training.metrics import count, dice
from minunet.training.step import update_running_stats

# ---- The data: of a synthetic head the slice that shows most of its tumour ------------------------------------------

images, masks = phantom.make_patient(seed=0, patient=0, size=96)
best = int(masks.sum(axis=(1, 2, 3)).argmax())
image, mask = images[best : best + 1], masks[best : best + 1]

x = apply(image, Normalization("volume").volume_statistics(images))  # (1, 96, 96, 3), about mean 0 and variance 1
target = mask.astype("float32")  # (1, 96, 96, 1), 0 or 1

# ---- The network, the loss, the optimiser ---------------------------------------------------------------------------

net = UNet(widths=(8, 16, 32), dropout=0.0, seed=0)  # dropout is there against learning by heart: off
loss = SegmentationLoss()  # (1 - soft Dice) + binary cross entropy
optimizer = AdamW(net.parameters(), lr=1e-3)

# ---- The training: forward, loss, backward, step; again and again ---------------------------------------------------

print("step   loss   Dice of the slice")
for step in range(301):
    logits, cache = net.forward(x, training=True)
    value, loss_cache = loss.forward(logits, target)
    if step % 10 == 0:
        score = dice(count(logits > 0, mask))  # a logit above 0 is a probability above 0.5
        print(f"{step:4}  {value.item():5.3f}   {score:.3f}")
        if score > 0.95:
            break
    dlogits = loss.backward(loss_cache)  # the slope of the loss in each logit
    dx, grads = net.backward(dlogits, cache)  # ... in each pixel, and in each parameter by its name
    optimizer.step(grads)
    # For predict, which knows no batch: what the inputs of each batch norm look like. There is one batch, so its own.
    update_running_stats(net, net.batch_stats(cache), momentum=0.0)

# ---- The picture ----------------------------------------------------------------------------------------------------

path = sys.argv[1] if len(sys.argv) > 1 else "overfit_one_slice.png"
plot_predictions(path, image, mask, net.predict(x), [f"phantom, slice {best + 1}, step {step}"])
print(f"the picture: {path}")

# Try: lr=1e-5, then 1e-1. target = 255 * target, the commonest mistake with masks. mask = np.roll(mask, 20, axis=2), a
# mask beside its tumour: learned by heart as well! momentum=0.99, training's usual value, and look at the picture.
