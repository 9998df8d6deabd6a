from drill import drill


def test_spoilt_files_give_a_result_or_an_error_of_ours(tmp_path):
    outcomes = drill(500, 0, tmp_path)
    assert sum(outcomes.values()) == 500
    # Neither is every file refused nor every one taken: both ways have been walked.
    for kind in {kind for kind, _ in outcomes}:
        assert outcomes[kind, "InputError"] >= 5, (kind, outcomes)
    assert sum(n for (_, outcome), n in outcomes.items() if outcome == "result") >= 50
