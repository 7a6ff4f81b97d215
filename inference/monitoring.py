"""The server's Prometheus metrics; docs/serving.md says what each means."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
PREFIX = "flaxtron_"


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def count(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        def measure(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=registry)

        self.requests = count("requests", "HTTP requests answered", ("path", "code"))
        self.finished = count("sequences", "Sequences ended", ("reason",))
        self.prompt_tokens = count("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = count("cached_tokens", "Tokens of prompts that were found in the cache")
        self.new_tokens = count("generated_tokens", "Tokens generated")
        self.first_token = measure(
            "time_to_first_token_seconds", "From a request to its first token", SECONDS
        )
        self.gap = measure("time_between_tokens_seconds", "From a token to the next of its sequence", GAPS)
        self.whole = measure("sequence_seconds", "From a request to its sequence's last token", SECONDS)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge that is read when it is asked for."""
        Gauge(PREFIX + name, text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
