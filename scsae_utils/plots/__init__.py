"""One function for each kind of figure; each returns a matplotlib ``Figure`` and says which of the paper's it is."""
# ruff: noqa: F401

from .cells import cell_tokens_bars, noise_distances, umap_studies, umap_types, umap_values
from .dictionary import cells_per_concept, concepts_per_cell, frequency_and_activation, sweep, training_curves
from .drivers import (
    area_scatter,
    attribution_errors,
    joint_losses,
    order_bands,
    p_values,
    precision_recall_bars,
    quadrant_scatter,
)
from .genes import attribution_heatmap, attribution_strip, deletion, volcano
from .grades import association_strip, grades_by_kind, lines_by_kind, real_and_null
from .meaning import gene_set_bars, word_cloud
from .style import GREY, HIGH_COLORS, KIND_COLORS, OTHER_COLORS, legend_below, palette, set_style, umap_axes
from .taxonomy import (
    activation_by_type,
    concept_examples,
    concept_map,
    concept_umaps,
    prototypes_in_umap,
    specificity_sensitivity,
    type_heatmap,
)
