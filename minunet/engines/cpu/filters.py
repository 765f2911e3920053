"""The stages at both ends of a step: the filters transformed and the dropout masks drawn; the gradients added up."""

import numpy as np

from minunet.base import rng
from minunet.engines.cpu import rows, taps, tiles
from minunet.engines.cpu.chunks import Cut, share
from minunet.engines.cpu.plan import Pool, Up
from minunet.engines.cpu.work import Work


class Filters:
    """The transformed filters of every convolution whose pixels are shared out.

    Each process transforms the filters of its share of the first channel that they have. In a prediction all slopes
    are known by now, and the filters get them here, where there are fewest numbers to multiply.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.units = [unit for unit in work.plan.units if unit.method != "channels"]

    def run(self) -> None:
        for unit in self.units:
            matrix = (rows if unit.method == "rows" else tiles).filter_transform(self.work.matrices)
            weight = self.work.weights[f"{unit.conv}.weight"]
            sign = self.work.norms[unit].sign
            weight = weight if (sign > 0).all() else weight * sign
            if not self.work.training:
                weight = weight * self.work.input_scale(unit)[:, None]
            self._transform(matrix, weight, self.work.arrays[unit.filters])
        for up in self.work.plan.ups:
            weight, out = self.work.weights[f"{up.conv}.weight"], self.work.arrays[up.taps]
            mine = share(weight.shape[2], self.work.member.rank, self.work.member.size)
            taps.lay_out(weight, slice(mine.start, mine.stop), out)

    def _transform(self, matrix: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
        """out <- this process's part of ``matrix`` times ``weight`` (3, 3, C, C')."""
        mine = share(weight.shape[2], self.work.member.rank, self.work.member.size)
        part = np.ascontiguousarray(weight[:, :, mine.start : mine.stop]).reshape(matrix.shape[1], -1)
        if matrix.shape[1] == 9:
            columns = slice(mine.start * weight.shape[3], mine.stop * weight.shape[3])
            np.matmul(matrix, part, out=out.reshape(len(matrix), -1)[:, columns])
        else:
            filters = out[:, :, mine.start : mine.stop]
            filters[...] = (matrix @ part).reshape(filters.shape)


class FlippedFilters(Filters):
    """Those of the backward pass, in the memory of the others, which forward has done with.

    dx is the convolution of dz with the filters turned by 180 degrees, their channels exchanged.
    """

    def run(self) -> None:
        for unit in self.units:
            if unit.source is not None:
                matrix = (rows if unit.method == "rows" else tiles).filter_transform(self.work.matrices)
                weight = self.work.weights[f"{unit.conv}.weight"][::-1, ::-1].swapaxes(2, 3)
                self._transform(matrix, weight, self.work.arrays[unit.flipped])


class FiltersAndMasks:
    """The filters, and the dropout masks of the step that ``key`` names: the same as the network's own layers draw."""

    def __init__(self, work: Work) -> None:
        self.work, self.filters = work, Filters(work)
        self.key = rng.Key(0)
        # The streams are numbered as in UNet: first those on the way down, then those on the way up, both from the top.
        dropped: list[Pool | Up] = [*work.plan.pools, *reversed(work.plan.ups)]
        self.masks = [(index, work.arrays[each.kept]) for index, each in enumerate(dropped)]

    def run(self) -> None:
        self.filters.run()
        work = self.work
        threshold = round(work.plan.dropout * 2**16)
        for index, kept in self.masks:
            key = self.key._replace(stream=rng.DROPOUT + index, image=self.key.image + work.first)
            # A stream is cut up by blocks of 16 values, which is what the generator counts in.
            blocks = -(-kept[0].size // 16)
            for chunk in work.chunks(Cut(blocks, -(-blocks // work.member.size), 1)):
                flat = kept[chunk.first_image].reshape(-1)[16 * chunk.first_row : 16 * (chunk.first_row + chunk.rows)]
                draws = rng.random_uint16(
                    key._replace(image=key.image + chunk.first_image), flat.size, first_block=chunk.first_row
                )
                np.greater_equal(draws, threshold, out=flat)


class Gradients:
    """The parts of the processes added up, in the order of their ranks; and the gradients of the batch norms."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.sums = []
        for name in filter(work.plan.adds_up, work.plan.parameters):
            total, *parts = (work.arrays[grads[name]].reshape(-1) for grads in work.plan.partial_grads)
            self.sums.append((total, parts))

    def run(self) -> None:
        member, arrays, grads = self.work.member, self.work.arrays, self.work.plan.grads
        for total, parts in self.sums:
            mine = share(total.size, member.rank, member.size)
            for part in parts:
                total[mine.start : mine.stop] += part[mine.start : mine.stop]
        if member.rank == 0:
            for unit in self.work.plan.units:
                dgamma, dbeta = self.work.norms[unit].gradients()
                arrays[grads[f"{unit.norm}.gamma"]][...] = dgamma
                arrays[grads[f"{unit.norm}.beta"]][...] = dbeta
