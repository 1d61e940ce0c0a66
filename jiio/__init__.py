"""Optimise the inputs of equilibrium networks at about the price of one inference, and train through it."""

from jiio.accelerated import Accelerated
from jiio.automatic import newton_step
from jiio.constraint import Box, Constraint, Free, L2Ball, LinfBall, Simplex
from jiio.cuda_graph import captured
from jiio.curvature import curvature, gauss_newton, inverse_of
from jiio.deq import DEQ
from jiio.fixed_point import fixed_point
from jiio.implicit import implicit
from jiio.intersection import Intersection
from jiio.load import load
from jiio.low_rank import LowRank
from jiio.nested import nested
from jiio.optimizer import LBFGS, PGD, Adam
from jiio.precondition import Diagonal, Matrix, Normalized, Scalar, Sign
from jiio.problem import Problem, State
from jiio.regularize import jacobian_penalty, spectral_radius
from jiio.schedule import Constant, Falling, Linear, Switch
from jiio.solution import ConvergenceWarning, NotConverged, Solution, Status, Work
from jiio.solve import solve
from jiio.solver import Anderson, Broyden, Delayed, Picard
from jiio.step import Step

__version__ = "0.1.0"
__all__ = [
    "DEQ",
    "LBFGS",
    "PGD",
    "Accelerated",
    "Adam",
    "Anderson",
    "Box",
    "Broyden",
    "Constant",
    "Constraint",
    "ConvergenceWarning",
    "Delayed",
    "Diagonal",
    "Falling",
    "Free",
    "Intersection",
    "L2Ball",
    "Linear",
    "LinfBall",
    "LowRank",
    "Matrix",
    "Normalized",
    "NotConverged",
    "Picard",
    "Problem",
    "Scalar",
    "Sign",
    "Simplex",
    "Solution",
    "State",
    "Status",
    "Step",
    "Switch",
    "Work",
    "captured",
    "curvature",
    "fixed_point",
    "gauss_newton",
    "implicit",
    "inverse_of",
    "jacobian_penalty",
    "load",
    "nested",
    "newton_step",
    "solve",
    "spectral_radius",
]
