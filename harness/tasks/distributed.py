"""A trial on several processes; this process alone is the group of one."""

from torch import Tensor


class Group:
    """The processes that train one trial together, each on its share of every batch: here, one."""

    rank, size = 0, 1

    def share(self, tensor: Tensor) -> Tensor:
        """This process's examples of a batch whose first dimension is that of all."""
        n = len(tensor) // self.size
        return tensor[self.rank * n : (self.rank + 1) * n]

    def average(self, tensors: list[Tensor]) -> None:
        """Replace the tensors by their means over the processes, in place."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the first process says so."""
        return flag


ALONE = Group()
