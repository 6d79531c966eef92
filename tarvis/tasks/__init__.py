"""The four tasks: adding one is a file beside these and a line below."""

from tarvis.tasks.pet import Pet
from tarvis.tasks.task import Session, Task, Video
from tarvis.tasks.vis import Vis
from tarvis.tasks.vos import Vos
from tarvis.tasks.vps import Vps

TASKS: dict[str, Task] = {"vis": Vis(), "vps": Vps(), "vos": Vos(), "pet": Pet()}

__all__ = ["TASKS", "Session", "Task", "Video"]
