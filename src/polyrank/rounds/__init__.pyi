from .engine import Engine as Engine
from .settings import Faults as Faults
from .settings import Sampling as Sampling
from .settings import Weighting as Weighting
