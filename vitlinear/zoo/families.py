"""What is known about a family of models beside its code."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A family of models, as lists and cards tell of it.

    Attributes:
        name: As `vitlinear list --family` takes it.
        title: Of the family.
        paper: Title of the paper.
        url: Address of the paper.
        text: What is said about the family, and about what is the paper's and what is added here.
        bibtex: Entry to cite.
    """
    name: str
    title: str
    paper: str | None
    url: str | None
    text: str
    bibtex: str
