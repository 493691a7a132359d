"""The order of the notebooks: what each needs and what it makes. All of a run lies in runs/<profile>/.

Run through the Makefile (`make book`), or: snakemake --cores 2 --config profile=profiles/mini.yaml
With `shards=16` among the --config, the embedding and the attributions are 16 jobs each; see book/cluster.md.
"""

from pathlib import Path

from scsae_utils.book import load_profile, missing_files, modules

config.setdefault("profile", "profiles/mini.yaml")
RUN = f"runs/{Path(config['profile']).stem}"
P = load_profile(config["profile"])
if missing := missing_files(P):  # before any work starts
    raise WorkflowError(f"not there: {', '.join(missing)}. `make fetch PROFILE={config['profile']}` gets them, or says how")
# The profile's path is filled in late: were it part of the rules' code, another path would rerun everything.
EXECUTE = "export OMP_NUM_THREADS={threads} NUMBA_NUM_THREADS={threads}; python -m scsae_utils.book execute --profile {config[profile]} --run {RUN}"
SHARDS = int(config.get("shards", 1))
THREADS = int(config.get("threads", workflow.cores))  # on a node, workflow.cores are all of it, allotted or not
JOB = f"export OMP_NUM_THREADS={{threads}} NUMBA_NUM_THREADS={{threads}}; python -m scsae_utils.jobs --profile {{config[profile]}} --run {{RUN}}"
GPU = {"gpu": 1} if P["embedding"]["device"] in ("auto", "cuda") else {}
PAGES = sorted(Path(RUN, "notebooks", "concepts").glob("concept_*[0-9].ipynb"))  # made by `make concept`


def needs(notebook):
    """A notebook, and the modules that it imports."""
    return [f"notebooks/{notebook}.ipynb", *modules(notebook)]


def files(*names):
    """Those of a section's values that are files or model folders: changing them reruns the notebook."""
    folders = {"scgpt-mini": "scsae_utils/data/scgpt-mini"}
    paths = [Path(folders.get(name, name)) for name in names if name]
    return [str(f) for p in paths for f in ([p] if p.is_file() else sorted(p.rglob("*"))) if f.is_file()]


def parts(stage):
    """The parts of some long work, if it is split into jobs; if not, the notebook does it all."""
    return [f"{RUN}/shards/{stage}_{k}_of_{SHARDS}.done" for k in range(SHARDS)] if SHARDS > 1 else []


def more(amount):
    """So much of a resource, and as much again with each attempt: a job may have failed for want of it."""
    return lambda wildcards, attempt: amount * attempt


rule book:
    """Render the executed notebooks and the pages around them."""
    input:
        expand(f"{RUN}/notebooks/{{name}}.ipynb", name=["00_ten_cells", "01_embedding", "02_sae", "03_concept_taxonomy", "04_case_study", "05_myeloid_concepts", "05b_drivers", "06_evidence", "07_atlas"]),
        f"{RUN}/atlas/index.js",
        PAGES,
        [str(p) for p in sorted(Path("book").rglob("*")) if p.is_file()],
        "_config.yml",
        [str(p) for p in sorted(Path("benchmarks", "results").glob("*.json"))],
        [str(p) for p in sorted(Path("scsae_utils").rglob("*.py"))],  # its pages quote docstrings and messages
        files("scgpt-mini"),
    output:
        f"{RUN}/book/index.html",
    shell:
        "python -m scsae_utils.book build --run {RUN} > /dev/null"


rule ten_cells:
    """Every step by hand; needs no results and makes none."""
    input:
        needs("00_ten_cells"),
    output:
        f"{RUN}/notebooks/00_ten_cells.ipynb",
    params:
        P["ten_cells"],
    threads: THREADS
    shell:
        EXECUTE + " 00_ten_cells"


rule embedding:
    """Cells in, scGPT embeddings out."""
    input:
        needs("01_embedding"),
        files(P["embedding"]["cells"], P["embedding"]["model"]),
        parts("block"),
    output:
        f"{RUN}/notebooks/01_embedding.ipynb",
        f"{RUN}/embedded.h5ad",
    params:
        P["embedding"],
    threads: THREADS
    resources:
        **GPU,
    shell:
        EXECUTE + " 01_embedding"


rule sae:
    """A dictionary of concepts, and their activations."""
    input:
        needs("02_sae"),
        f"{RUN}/embedded.h5ad",
    output:
        f"{RUN}/notebooks/02_sae.ipynb",
        f"{RUN}/sae.safetensors",
        f"{RUN}/activations.h5ad",
    params:
        P["sae"],
    threads: THREADS
    resources:
        **GPU,
    shell:
        EXECUTE + " 02_sae"


rule concept_taxonomy:
    """The kinds of concepts."""
    input:
        needs("03_concept_taxonomy"),
        f"{RUN}/activations.h5ad",
        f"{RUN}/sae.safetensors",
        f"{RUN}/embedded.h5ad",
    output:
        f"{RUN}/notebooks/03_concept_taxonomy.ipynb",
        f"{RUN}/concepts.h5ad",
    params:
        P["concept_taxonomy"],
    threads: THREADS
    resources:
        **GPU,
    shell:
        EXECUTE + " 03_concept_taxonomy"


rule case_study:
    """One concept from all sides."""
    input:
        needs("04_case_study"),
        f"{RUN}/concepts.h5ad",
        f"{RUN}/evidence.parquet",
        files(P["case_study"]["descriptions"], P["case_study"]["collection"]),
    output:
        f"{RUN}/notebooks/04_case_study.ipynb",
    params:
        P["case_study"],
    threads: THREADS
    resources:
        **GPU,
    shell:
        EXECUTE + " 04_case_study"


rule concept_page:
    """The case study of another concept, as a page of its own."""
    input:
        needs("04_case_study"),
        f"{RUN}/concepts.h5ad",
        f"{RUN}/evidence.parquet",
        files(P["case_study"]["descriptions"], P["case_study"]["collection"]),
    output:
        f"{RUN}/notebooks/concepts/concept_{{number}}.ipynb",
    params:
        P["case_study"],
    threads: THREADS
    resources:
        **GPU,
    shell:
        EXECUTE + " 04_case_study --concept {wildcards.number} || "
        "{{ echo 'The page of concept {wildcards.number} was left out of the book: run make again to go on without it.' >&2; exit 1; }}"


rule myeloid_concepts:
    """The concepts of one lineage."""
    input:
        needs("05_myeloid_concepts"),
        files(P["myeloid_concepts"]["cells"], P["myeloid_concepts"]["model"]),
        [] if P["myeloid_concepts"]["cells"] else f"{RUN}/concepts.h5ad",
    output:
        f"{RUN}/notebooks/05_myeloid_concepts.ipynb",
    params:
        P["myeloid_concepts"],
    threads: THREADS
    resources:
        **({} if P["myeloid_concepts"]["cells"] else GPU),
    shell:
        EXECUTE + " 05_myeloid_concepts"


rule drivers:
    """The genes of every concept, as statistics."""
    input:
        needs("05b_drivers"),
        f"{RUN}/concepts.h5ad",
        parts("confirm" if P["drivers"]["method"] == "screened" else "exact"),
    output:
        f"{RUN}/notebooks/05b_drivers.ipynb",
        f"{RUN}/drivers.parquet",
        f"{RUN}/attributions.parquet",
        f"{RUN}/curve_areas.parquet",
        f"{RUN}/curves.parquet",
        f"{RUN}/quadrants.parquet",
    params:
        P["drivers"],
    threads: THREADS
    resources:
        **GPU,
    shell:
        EXECUTE + " 05b_drivers"


rule evidence:
    """For and against every concept, and the nulls of the book's figures."""
    input:
        needs("06_evidence"),
        f"{RUN}/concepts.h5ad",
        f"{RUN}/drivers.parquet",
        f"{RUN}/attributions.parquet",
        f"{RUN}/curve_areas.parquet",
        files(P["evidence"]["gene_sets"]),
    output:
        f"{RUN}/notebooks/06_evidence.ipynb",
        f"{RUN}/evidence.parquet",
    params:
        P["evidence"],
    threads: THREADS
    resources:
        **GPU,
    shell:
        EXECUTE + " 06_evidence"


rule atlas:
    """The data of the page on which every concept can be searched."""
    input:
        needs("07_atlas"),
        f"{RUN}/embedded.h5ad",
        f"{RUN}/concepts.h5ad",
        [f"{RUN}/{name}.parquet" for name in ("drivers", "quadrants", "attributions", "curves", "evidence")],
        files(P["atlas"]["descriptions"], P["atlas"]["collection"]),
    output:
        f"{RUN}/notebooks/07_atlas.ipynb",
        f"{RUN}/atlas/index.js",
    params:
        P["atlas"],
    threads: THREADS
    shell:
        EXECUTE + " 07_atlas"


if SHARDS > 1:

    rule shard_cells:
        """Cells and genes, chosen once for all jobs."""
        input:
            modules("01_embedding"),
            "scsae_utils/jobs.py",
            files(P["embedding"]["cells"], P["embedding"]["model"]),
        output:
            f"{RUN}/shards/cells.h5ad",
        params:
            P["embedding"],
        resources:
            mem_mb=more(32000),
            runtime=more(120),
        shell:
            JOB + " cells"

    rule shard_embedding:
        """A part of the cells, embedded."""
        input:
            f"{RUN}/shards/cells.h5ad",
        output:
            touch(f"{RUN}/shards/block_{{part}}_of_{SHARDS}.done"),
        threads: THREADS
        resources:
            mem_mb=more(8000),
            runtime=more(240),
            **GPU,
        shell:
            JOB + " block --part {wildcards.part} --of {SHARDS}"

    rule shard_attribution:
        """A part of the prototypes: genes screened, confirmed (when all are screened) or all of them exact."""
        input:
            modules("05b_drivers"),
            "scsae_utils/jobs.py",
            f"{RUN}/concepts.h5ad",
            lambda wildcards: parts("screen") if wildcards.stage == "confirm" else [],
        output:
            touch(f"{RUN}/shards/{{stage}}_{{part}}_of_{SHARDS}.done"),
        wildcard_constraints:
            stage="exact|screen|confirm",
        params:
            P["drivers"],
        threads: THREADS
        resources:
            mem_mb=more(16000),
            runtime=more(240),
            **GPU,
        shell:
            JOB + " {wildcards.stage} --part {wildcards.part} --of {SHARDS}"
