"""Cells and genes for ``pretrain_mini.py``: files, symbols, vocabulary."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
from scipy import sparse

MARKERS = """
    PPBP PF4 MYL9 TUBB1 ITGA2B GP9 CTSD CD163 CD14 LYZ S100A8 S100A9 S100A12 FCN1 VCAN CST3 FCGR3A MS4A7 C1QA
    C1QB C1QC HLA-DRA HLA-DRB1 HLA-DRB5 HLA-DPA1 HLA-DPB1 HLA-DQA1 HLA-DQA2 HLA-DQB1 HLA-DMA HLA-DMB HLA-DOA
    HLA-DOB CD74 CIITA MT-ND1 MT-ND2 MT-ND3 MT-ND4 MT-ND4L MT-ND5 MT-ND6 MT-ATP6 MT-ATP8 MT-CO1 MT-CO2 MT-CO3
    MT-CYB CD19 MS4A1 CD79A CD79B TCL1A IGHM IGHD IGKC IGLC2 IGLC3 IGHG1 IGHA1 IGJ JCHAIN MZB1 SDC1 XBP1 PRDM1
    CD27 CD3D CD3E CD3G CD247 CD4 CD8A CD8B IL7R CCR7 LEF1 TCF7 SELL IL2RA FOXP3 CTLA4 IKZF2 GZMA GZMB GZMH GZMK
    GNLY NKG7 PRF1 KLRB1 KLRD1 KLRF1 NCAM1 KLRC1 TRDC TRGC1 TRGC2 TRAC TRBC1 TRBC2 SLC4A10 FCER1A CD1C CLEC10A
    CLEC9A XCR1 IL3RA CLEC4C LILRA4 IRF7 IRF8 CD34 KIT GATA1 GATA2 MPO ELANE HBB HBA1 HBA2 MKI67 TOP2A ISG15
    IFIT1 IFIT3 MX1 STAT1 CXCL10 IL1B TNF CCL3 CCL4 CCL5 IL32 B2M ACTB CCR6 CXCR3 CXCR4 CXCR5 GATA3 RORC TBX21
    EOMES TIGIT LAG3 PDCD1 HAVCR2 CD68 MRC1 MARCO APOE SPP1 FCGR1A ITGAX ITGAM
""".split()


def read_cells(path: str | Path) -> ad.AnnData:
    """Cells of an ``.h5ad``, or of an ``.npz`` with a CSR matrix, genes, cells and ``obs_*`` columns."""
    if str(path).endswith(".h5ad"):
        cells = ad.read_h5ad(path)
        cells.X = sparse.csr_matrix(cells.X, dtype=np.float32)
    else:
        with np.load(path, allow_pickle=False) as f:
            x = sparse.csr_matrix((f["data"].astype(np.float32), f["indices"], f["indptr"]), shape=tuple(f["shape"]))
            cells = ad.AnnData(x)
            cells.obs_names, cells.var_names = f["cells"].astype(str), f["genes"].astype(str)
            for key in f.files:
                if key.startswith("obs_"):
                    cells.obs[key.removeprefix("obs_")] = f[key].astype(str)
    cells.var_names_make_unique()
    return cells


def mini_cells() -> dict[str, ad.AnnData]:
    """The cells of profile ``mini``, from the packages that ship them: for measurements, never for training."""
    import celltypist
    import pandas as pd
    import scanpy as sc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = sc.datasets.pbmc68k_reduced()
    pbmc = ad.AnnData(sparse.csr_matrix(small.raw.X), obs=small.obs[["bulk_labels"]].astype(str))
    pbmc.var_names = small.raw.var_names.astype(str)
    table = pd.read_csv(celltypist.samples.get_sample_csv(), index_col=0)
    sample = ad.AnnData(sparse.csr_matrix(table.to_numpy(np.float32)))
    sample.obs_names, sample.var_names = table.index.astype(str), table.columns.astype(str)
    common = [g for g in pbmc.var_names if g in set(sample.var_names)]
    return {"pbmc68k_reduced": pbmc, "celltypist_sample": sample[:, common].copy()}


def barcode(name: str) -> str:
    """The cell barcode in a cell's name: its longest run of ten or more bases, else the name."""
    return max(re.findall("[ACGTN]{10,}", name), key=len, default=name)


def read_studies(paths: list[str], mini: dict[str, ad.AnnData]) -> tuple[dict[str, ad.AnnData], dict[str, int]]:
    """Training studies without cells whose barcode another study, or a cell of the mini profile, has too."""
    seen = {barcode(c) for cells in mini.values() for c in cells.obs_names}
    studies, dropped = {}, {}
    for path in paths:
        cells = read_cells(path)
        codes = [barcode(c) for c in cells.obs_names]
        fresh = np.array([c not in seen for c in codes])
        seen.update(codes)
        studies[Path(path).name], dropped[Path(path).name] = cells[fresh].copy(), int((~fresh).sum())
    return studies, dropped


def alias_table(path: str | None) -> dict[str, set[str]]:
    """Other names of a symbol and, for each of these, the symbol.

    From NCBI Gene of 2016 through goatools, if it is there, and from a table with symbol, prev_symbol, alias_symbol.
    """
    groups: list[tuple[str, list[str]]] = []
    try:
        from goatools.test_data.genes_NCBI_9606_ProteinCoding import GENEID2NT

        groups += [
            (gene.Symbol, str(gene.Aliases).replace("'", "").strip("[]").split(", ")) for gene in GENEID2NT.values()
        ]
    except ImportError:
        pass
    if path:
        import pandas as pd

        rows = pd.read_csv(path, sep="\t", dtype=str).fillna("").itertuples()
        groups += [(r.symbol, f"{r.prev_symbol}|{r.alias_symbol}".replace('"', "").split("|")) for r in rows]
    names: dict[str, set[str]] = {}
    for symbol, others in groups:
        for other in {o.strip() for o in others} - {"", symbol}:
            names.setdefault(symbol, set()).add(other)
            names.setdefault(other, set()).add(symbol)
    return names


def harmonise(genes: np.ndarray, wanted: set[str], names: dict[str, set[str]]) -> dict[str, str]:
    """Old or new symbols of a study that are another name of exactly one wanted gene that the study lacks."""
    have, found = set(genes), {}
    for gene in have - wanted:
        target = (names.get(gene, set()) & wanted) - have
        if len(target) == 1:
            found.setdefault(target.pop(), []).append(gene)
    return {sources[0]: target for target, sources in found.items() if len(sources) == 1}


def choose_genes(studies: list[ad.AnnData], forced: list[str], wished: list[str], n_genes: int) -> list[str]:
    """Forced genes, wished ones that at least two studies measured, then genes variable in several studies."""
    import scanpy as sc

    score: dict[str, float] = {}
    for study in studies:
        x = study[:, np.asarray((study.X > 0).sum(0)).ravel() >= max(5, 0.004 * study.n_obs)].copy()
        sc.pp.normalize_total(x, target_sum=1e4)
        sc.pp.log1p(x)
        sc.pp.highly_variable_genes(x, flavor="seurat", n_top_genes=min(2000, x.n_vars - 1))
        rank = x.var["dispersions_norm"].rank(ascending=False)
        for gene, r in rank[rank <= 6000].items():
            score[gene] = score.get(gene, 0) + math.sqrt(study.n_obs) / (100 + r)
    measured: dict[str, int] = {}
    for study in studies:
        for gene in study.var_names:
            measured[gene] = measured.get(gene, 0) + 1
    genes = [g for g in dict.fromkeys(forced) if g]
    genes += [g for g in wished if measured.get(g, 0) >= 2]
    genes += sorted(score, key=lambda g: (-score[g], g))
    return sorted(dict.fromkeys(genes[: 10 * n_genes]), key=genes.index)[:n_genes]


def vocabulary(studies, mini, held_out, names, n_genes: int) -> tuple[list[str], dict[str, str]]:
    """Genes of the model, after bringing the studies to one name for each (in place); and other names of these genes.

    All genes of ``pbmc68k_reduced`` under its symbols, immune markers, the genes of the smallest held-out panel (by
    name alone, its cells are not looked at), then variable genes.
    """
    panel = list(mini["pbmc68k_reduced"].var_names)
    wished = list(min(held_out.values(), key=lambda a: a.n_vars).var_names) if held_out else []
    everywhere = set().union(*(s.var_names for s in studies.values()))
    other = {g for s in studies.values() for g in harmonise(s.var_names, set(panel + wished), names)}
    forced = [*panel, *(m for m in MARKERS if m in everywhere and m not in other)]
    for study in studies.values():
        new = harmonise(study.var_names, set(forced + wished), names)
        study.var_names = [new.get(g, g) for g in study.var_names]
    genes = sorted(choose_genes(list(studies.values()), forced, wished, n_genes))
    aliases = {}
    for gene in genes:
        for name in names.get(gene, set()) - set(genes):
            if len(names[name] & set(genes)) == 1:
                aliases[name] = gene
    return genes, aliases
