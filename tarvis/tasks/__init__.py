"""The four tasks: adding one is a file beside these and a line below."""

from tarvis.tasks.objects import ObjectTask
from tarvis.tasks.task import Session, Task, Video
from tarvis.tasks.vis import Vis
from tarvis.tasks.vps import Vps

TASKS: dict[str, Task] = {
    "vis": Vis(),
    "vps": Vps(),
    "vos": ObjectTask("vos", "davis", given_by="mask"),
    "pet": ObjectTask("pet", "burst", given_by="point", trained_by="vos"),
}
FOLLOW = ObjectTask("vos", "davis", given_by=None)
"""VOS of objects that are given by masks, by points, or by both."""
TRAINED = tuple(name for name, task in TASKS.items() if task.trained_by is None)
"""The tasks that clips are made for; these train the others too."""

__all__ = ["FOLLOW", "TASKS", "TRAINED", "Session", "Task", "Video"]
