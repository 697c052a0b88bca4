"""Finding the log of a rank."""

from slurm.logs import main


def test_a_state_that_cannot_be_read_is_one_message(tmp_path, capsys):
    (tmp_path / "state").write_text("{")
    assert main([str(tmp_path), "0"]) == 2
    assert "state cannot be read" in capsys.readouterr().err
