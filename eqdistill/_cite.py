import re
from importlib.metadata import version
from typing import Any

from ._describe import describe


# The classes and functions whose docstrings cite each paper.
_USES = {
    "maclaurin2015": "ReversibleSolver UnrolledSolver",
    "luketina2016": "NeumannSeries",
    "pedregosa2016": "Bilevel DampedCG hypergradient_error",
    "wang2018": "Fresh UnrolledSolver from_kmeans from_real learned_rates",
    "shaban2019": "LastSteps",
    "lorraine2020": "NeumannSeries",
    "nguyen2021": "ZCA",
    "zhao2021condensation": "AlexNet ConvNet LeNet MLP ResNet18 VGG11 dc",
    "zhao2021augmentation": "Affine ColourJitter Crop Cutout Flip OneOf",
    "blondel2022": "ArgminSolver hypergradient_error",
    "kim2022": "Packed",
    "loo2022": "RandomFeatures zero_head",
    "zhou2022": "ConvNet FeatureRegression Pool RelativeRidge RidgeSolver SquaredError "
    "frepo",
    "loo2023": "LinearisedSolver",
    "chen2024": "distill_exactly",
    "feng2024": "RandomWindow clip_by_running_norm",
    "cazenavette2025": "AugmentedFit Pyramid",
    "li2025evaluation": "label_robust_score",
    "li2025random": "GradientWindow",
}
# Inside a recipe, these only train the models that measure a distilled set.
_TRAINING = {"Fresh", "UnrolledSolver"}
_NAME = re.compile(r"'?eqdistill\.[\w.<>]+'?|'\w+'")


def cite(*objects: Any) -> str:
    """Returns the BibTeX entries of this package and of the papers behind the classes
    and functions that the given objects use. Each entry appears once.

    !!! Example
        ```python
        print(eqd.cite(result, evaluation))
        ```

    **Arguments:**

    - `objects`: any objects: the result of [`eqdistill.distill`][], which includes its
        objective, optimiser and data; the result of [`eqdistill.evaluate`][], which
        includes its recipe; the result of [`eqdistill.load`][], which includes the
        recipe but not the objective; or objects, classes and functions of this package.
    """
    described = describe(objects=objects)
    # The descriptions name the classes and functions. Results hold names as text.
    names = {path: x for path, x in described.items() if _NAME.fullmatch(x)}
    recipes = tuple(f"{p}." for p, x in names.items() if x.endswith("_recipes.Recipe"))
    used: set[str] = set()
    for path, x in names.items():
        words = {*re.findall(r"\w+", x)}
        used |= words - _TRAINING if path.startswith(recipes) else words
    papers = [_PAPERS[key] for key, x in _USES.items() if used & {*x.split()}]
    return "\n\n".join([_PACKAGE % version("eqdistill"), *papers])


_PACKAGE = """\
@software{eqdistill,
  author = {{The eqdistill authors}},
  title = {eqdistill: dataset distillation in {JAX} and {Equinox}},
  version = {%s},
  year = {2026},
  url = {https://github.com/eqdistill/eqdistill},
}"""

_BIBTEX = """\
@inproceedings{maclaurin2015,
  author = {Maclaurin, Dougal and Duvenaud, David and Adams, Ryan P.},
  title = {Gradient-based Hyperparameter Optimization through Reversible Learning},
  booktitle = {International Conference on Machine Learning}, year = {2015},
}

@inproceedings{luketina2016,
  author = {Luketina, Jelena and Berglund, Mathias and Greff, Klaus and Raiko, Tapani},
  title = {Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters},
  booktitle = {International Conference on Machine Learning}, year = {2016},
}

@inproceedings{pedregosa2016,
  author = {Pedregosa, Fabian},
  title = {Hyperparameter optimization with approximate gradient},
  booktitle = {International Conference on Machine Learning}, year = {2016},
}

@article{wang2018,
  author = {Wang, Tongzhou and Zhu, Jun-Yan and Torralba, Antonio and Efros, Alexei A.},
  title = {Dataset Distillation},
  journal = {arXiv preprint arXiv:1811.10959}, year = {2018},
}

@inproceedings{shaban2019,
  author = {Shaban, Amirreza and Cheng, Ching-An and Hatch, Nathan and Boots, Byron},
  title = {Truncated Back-propagation for Bilevel Optimization},
  booktitle = {Artificial Intelligence and Statistics}, year = {2019},
}

@inproceedings{lorraine2020,
  author = {Lorraine, Jonathan and Vicol, Paul and Duvenaud, David},
  title = {Optimizing Millions of Hyperparameters by Implicit Differentiation},
  booktitle = {Artificial Intelligence and Statistics}, year = {2020},
}

@inproceedings{nguyen2021,
  author = {Nguyen, Timothy and Novak, Roman and Xiao, Lechao and Lee, Jaehoon},
  title = {Dataset Distillation with Infinitely Wide Convolutional Networks},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2021},
}

@inproceedings{zhao2021condensation,
  author = {Zhao, Bo and Mopuri, Konda Reddy and Bilen, Hakan},
  title = {Dataset Condensation with Gradient Matching},
  booktitle = {International Conference on Learning Representations}, year = {2021},
}

@inproceedings{zhao2021augmentation,
  author = {Zhao, Bo and Bilen, Hakan},
  title = {Dataset Condensation with Differentiable {Siamese} Augmentation},
  booktitle = {International Conference on Machine Learning}, year = {2021},
}

@inproceedings{blondel2022,
  author = {Blondel, Mathieu and Berthet, Quentin and Cuturi, Marco and Frostig, Roy and
            Hoyer, Stephan and Llinares-L{\\'o}pez, Felipe and Pedregosa, Fabian and
            Vert, Jean-Philippe},
  title = {Efficient and Modular Implicit Differentiation},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2022},
}

@inproceedings{kim2022,
  author = {Kim, Jang-Hyun and Kim, Jinuk and Oh, Seong Joon and Yun, Sangdoo and
            Song, Hwanjun and Jeong, Joonhyun and Ha, Jung-Woo and Song, Hyun Oh},
  title = {Dataset Condensation via Efficient Synthetic-Data Parameterization},
  booktitle = {International Conference on Machine Learning}, year = {2022},
}

@inproceedings{loo2022,
  author = {Loo, Noel and Hasani, Ramin and Amini, Alexander and Rus, Daniela},
  title = {Efficient Dataset Distillation using Random Feature Approximation},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2022},
}

@inproceedings{zhou2022,
  author = {Zhou, Yongchao and Nezhadarya, Ehsan and Ba, Jimmy},
  title = {Dataset Distillation using Neural Feature Regression},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2022},
}

@inproceedings{loo2023,
  author = {Loo, Noel and Hasani, Ramin and Lechner, Mathias and Rus, Daniela},
  title = {Dataset Distillation with Convexified Implicit Gradients},
  booktitle = {International Conference on Machine Learning}, year = {2023},
}

@inproceedings{chen2024,
  author = {Chen, Yilan and Huang, Wei and Weng, Tsui-Wei},
  title = {Provable and Efficient Dataset Distillation for Kernel Ridge Regression},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2024},
}

@inproceedings{feng2024,
  author = {Feng, Yunzhen and Vedantam, Shanmukha Ramakrishna and Kempe, Julia},
  title = {Embarrassingly Simple Dataset Distillation},
  booktitle = {International Conference on Learning Representations}, year = {2024},
}

@inproceedings{cazenavette2025,
  author = {Cazenavette, George and Torralba, Antonio and Sitzmann, Vincent},
  title = {Dataset Distillation for Pre-Trained Self-Supervised Vision Models},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2025},
}

@article{li2025evaluation,
  author = {Li, Zekai and Zhong, Xinhao and others},
  title = {{DD-Ranking}: Rethinking the Evaluation of Dataset Distillation},
  journal = {arXiv preprint arXiv:2505.13300}, year = {2025},
}

@inproceedings{li2025random,
  author = {Li, Muquan and Gou, Hang and Zhang, Dongyang and Liang, Shuang and
            Xie, Xiurui and Ouyang, Deqiang and Qin, Ke},
  title = {Beyond Random: Automatic Inner-loop Optimization in Dataset Distillation},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2025},
}"""
_PAPERS = {x.partition("{")[2].partition(",")[0]: x for x in _BIBTEX.split("\n\n")}
