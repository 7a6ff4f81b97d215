"""The server's metrics in Prometheus' format."""

from inference.monitoring import Metrics


def test_two_servers_count_apart_and_gauges_are_read_when_asked():
    one, other = Metrics(), Metrics()
    one.new_tokens.inc(3)
    one.requests.labels(path="/", code="200").inc()
    one.gap.observe(0.02)
    values = [5.0]
    one.watch("waiting", "For a row", lambda: values[0])
    values[0] = 7.0
    text = one.text().decode()
    for line in (
        "flaxtron_generated_tokens_total 3.0",
        'flaxtron_requests_total{code="200",path="/"} 1.0',
        'flaxtron_time_between_tokens_seconds_bucket{le="0.025"} 1.0',
        "flaxtron_waiting 7.0",
    ):
        assert line in text.splitlines()
    assert "flaxtron_generated_tokens_total 0.0" in other.text().decode()
