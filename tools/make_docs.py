"""Write docs/: a page for each command from its dataclass, the list of models (README has it too), the operations."""

from pathlib import Path

from qsharded.chat import ChatConfig
from qsharded.compare import CompareConfig
from qsharded.config import TrainConfig
from qsharded.config.rendering import markdown
from qsharded.doctor import DoctorConfig
from qsharded.generate import GenerateConfig
from qsharded.inspect import InspectConfig
from qsharded.merge import MergeConfig
from qsharded.preview import PreviewConfig
from qsharded.quantize import QuantizeConfig
from tools import architectures, families, operations

DOCS = Path(__file__).parent.parent / "docs"
README = DOCS.parent / "README.md"
PAGES = {
    "train.md": TrainConfig,
    "generate.md": GenerateConfig,
    "chat.md": ChatConfig,
    "merge.md": MergeConfig,
    "quantize.md": QuantizeConfig,
    "inspect.md": InspectConfig,
    "preview.md": PreviewConfig,
    "compare.md": CompareConfig,
    "doctor.md": DoctorConfig,
}


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    for name, command in PAGES.items():
        (DOCS / name).write_text(markdown(command), encoding="utf-8")
    (DOCS / "models.md").write_text(models_page(), encoding="utf-8")
    (DOCS / "operations.md").write_text(operations.page(), encoding="utf-8")
    README.write_text(in_readme(README.read_text(encoding="utf-8")), encoding="utf-8")


def models_page() -> str:
    """docs/models.md."""
    return f"{families.page()}\n{architectures.section()}"


def in_readme(readme: str) -> str:
    """README with the families and architectures that are tested."""
    return architectures.in_readme(families.in_readme(readme))


if __name__ == "__main__":
    main()
