"""The distance estimator: a Siamese network, its training, its file.

* :mod:`~cryoem.estimator.model`: the estimator, from images to features;
* :mod:`~cryoem.estimator.networks`: its encoders; :mod:`~cryoem.estimator.weights`: its file;
* :mod:`~cryoem.estimator.training`: :func:`train_on`, from a density to an estimator;
  :func:`train`, the recipe, and :func:`fit`, one run of it, with their
  :mod:`~cryoem.estimator.loss`, :mod:`~cryoem.estimator.record` (the history, the checkpoint) and
  :mod:`~cryoem.estimator.calibration` (how far off orientations are to be expected).

All of it needs TensorFlow, as :mod:`cryoem.recovery.descent` does and nothing else.
"""

from .calibration import calibrate
from .loss import Objective, PairLoss, pair_distances
from .model import Estimator, Prediction, load_estimator
from .training import broad_ranges, fit, train, train_on

__all__ = [
    "Estimator",
    "Objective",
    "PairLoss",
    "Prediction",
    "broad_ranges",
    "calibrate",
    "fit",
    "load_estimator",
    "pair_distances",
    "train",
    "train_on",
]
