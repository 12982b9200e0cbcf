from pmblkd.spin import TURN_SPINS, Spinner


def promising(busy_poll_us: int = 50) -> Spinner:
    spinner = Spinner(busy_poll_us)
    spinner.answered(1)
    spinner.waited(0.0001)
    return spinner


def test_a_lone_busy_client_may_spin() -> None:
    spinner, user = promising(), object()
    assert not spinner.worth_it(user), "the first time nobody knows it"
    assert spinner.worth_it(user)


def test_two_busy_clients_may_not() -> None:
    spinner, users = promising(), [object(), object()]
    assert not any(spinner.worth_it(users[turn % 2]) for turn in range(10))


def test_a_deep_queue_needs_no_spin() -> None:
    spinner, user = promising(), object()
    spinner.worth_it(user)
    spinner.answered(8)
    assert not spinner.worth_it(user)


def test_a_miss_ends_it_and_a_short_wait_gives_it_back() -> None:
    spinner, user = promising(), object()
    spinner.worth_it(user)
    spinner.missed()
    assert not spinner.worth_it(user)
    spinner.waited(1.0)
    assert not spinner.worth_it(user)
    spinner.waited(0.0001)
    assert spinner.worth_it(user)


def test_a_client_that_always_hits_still_gives_the_loop_its_turns() -> None:
    spinner, user = promising(), object()
    answers = [spinner.worth_it(user) for _ in range(10 * TURN_SPINS)]
    assert answers.count(True) > 9 * TURN_SPINS
    for start in range(len(answers) - TURN_SPINS):
        assert not all(answers[start : start + TURN_SPINS + 1])


def test_zero_switches_it_off() -> None:
    spinner, user = promising(0), object()
    spinner.worth_it(user)
    assert not spinner.worth_it(user)
