"""Says at the end how many blocks ran, and which did not and why."""

import collections


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]
    blocks = [value for report in reports for key, value in report.user_properties if key == "block"]
    if not blocks:
        return
    ran = [block for block in blocks if block[2] is None]
    languages = ", ".join(
        f"{count} {name}" for name, count in collections.Counter(block[1] for block in ran).most_common()
    )
    write = terminalreporter.write_line
    terminalreporter.section("code blocks")
    write(f"{len(ran)} ran ({languages}), {len(blocks) - len(ran)} were checked and not run")
    for where, language, reason, _ in sorted(block for block in blocks if block[2]):
        write(f"  not run: {where} ({language}): {reason}")
    for where, language, _, seconds in sorted(ran, key=lambda block: -block[3])[:10]:
        write(f"  {seconds:5.1f} s  {where} ({language})")
