"""The whole student learns its teachers' outputs."""

from collections.abc import Sequence

from torch import nn

from rankship_pipeline.evaluate.likelihood import Likelihood
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.recover.refine.course import Course
from rankship_pipeline.recover.refine.draw import draw_batches
from rankship_pipeline.recover.refine.teach import measure_loss, measure_teacher
from rankship_pipeline.recover.refine.units import list_units


def learn_outputs(course: Course, teachers: Sequence[tuple[nn.Module, Inputs]], likelihood: Likelihood | None) -> None:
    """Train the student to the end of its course, each step on a batch with equally many samples of every teacher."""
    training = course.training
    measured = [measure_teacher(*teacher, likelihood) for teacher in teachers]
    pools = [inputs for _, inputs in teachers]
    plain = likelihood is None or all(answer.is_choice for answer in likelihood.values())
    units = {} if plain else list_units(training.student)
    size = min(teacher.batch for teacher in measured)
    while (share := course.look()) < 1:
        joined, parts = draw_batches(pools, course.choice.augment, training.student, training.generator, size)
        course.step(measure_loss(training.student, measured, joined, parts), share, units)
