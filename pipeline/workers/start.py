"""Loads the model of a request, for what its stage does with it."""

from pipeline.workers.request import MismatchOptions, Request, Worker


def start_worker(request: Request) -> Worker:
    """Load the model of a request.

    Raises:
        InputError: The model cannot be loaded, or the stage cannot use it.
        MissingExtraError: vLLM is not installed.
        OutOfMemoryError: There is not enough memory for it.
    """
    if request.stage == "anchors":
        from pipeline.workers.anchors.mismatched import MismatchedAnchors
        from pipeline.workers.anchors.sampler import AnchorSampler

        return MismatchedAnchors(request) if isinstance(request.options, MismatchOptions) else AnchorSampler(request)
    if request.stage == "attribute":
        from pipeline.workers.pair_attributor import PairAttributor

        return PairAttributor(request)
    from pipeline.workers.pair_scorer import PairScorer

    return PairScorer(request)
