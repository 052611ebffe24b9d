"""`raymill plan --calibrate` predicts the wall time of a run that is then taken."""

import json
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.commands.all_stages import river
from cluster.settings.flags import read_config
from cluster.settings.run import RunConfig
from tests.jobs.corpora import make_corpus

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SETTINGS = """
run_id: predicted
model: {{preset: demo}}
data: {{source: ["{folder}/texts"], vocab_size: 512}}
train: {{max_tokens: 1000000, global_batch_size: 8, micro_batch_size: 4, learning_rate: 3.0e-3, eval_max_tokens: 32768}}
storage: {{uri: "{folder}/mill"}}
"""


def test_a_rehearsal_predicts_the_wall_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_corpus(tmp_path / "texts", num_documents=1500)
    settings = tmp_path / "run.yaml"
    settings.write_text(SETTINGS.format(folder=tmp_path))
    assert main(["plan", str(settings), "--calibrate", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out.splitlines()[-1])["calibration"]
    with river(read_config(settings, RunConfig)) as found:
        real_s = sum(found.stage_s.values())
    print(f"predicted {predicted['wall_s']} s {predicted['stage_s']}, took {real_s:.1f} s {found.stage_s}")
    # 15% on a quiet machine; others share the machines that tests run on.
    assert predicted["wall_s"] == pytest.approx(real_s, rel=0.25)
    assert predicted["took_s"] < real_s
