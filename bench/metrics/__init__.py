"""The metrics: name -> function from a Subject to named raw values. One file a metric."""

from bench.metrics.latency import latency
from bench.metrics.perplexity import perplexity
from bench.metrics.size import size
from bench.metrics.subject import Metric

METRICS: dict[str, Metric] = {"size": size, "perplexity": perplexity, "latency": latency}
