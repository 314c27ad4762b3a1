use hearth_scheduler::log::{EventLog, RocksLog};

use super::*;

#[path = "../../../../scheduler/tests/session/mod.rs"]
mod session;

#[tokio::test]
async fn every_event_shows_the_state_that_the_log_gives_right_after_it() {
    let entries = session::session(40);
    let dir = tempfile::tempdir().unwrap();
    RocksLog::open(dir.path()).unwrap().append(&entries).unwrap();
    let mut digests = vec![String::new()];
    let (mut state, mut void) = (State::default(), Vec::new());
    for entry in &entries {
        let (envelope, event) = entry.event.as_ref().unwrap();
        let applied = state.apply(entry.seq, envelope, event);
        if applied.judged != Judged::Valid {
            void.push(entry.seq);
        }
        digests.push(scheduler_core::view(&state).digest);
    }
    let last = entries.last().unwrap().seq.0;
    assert!(last > 4 * NEAREST, "{last} events are too few to keep states between");

    let history = History::Folder(Box::new(RocksLog::open_reader(dir.path()).unwrap()));
    let mut steps = Steps::new(history).await.unwrap();
    // Back through all, forth through all, and here and there.
    let here_and_there = (1..=last).map(|n| 1 + n * 7919 % last);
    for seq in (1..=last).rev().chain(1..=last).chain(here_and_there) {
        let image = hearth_protocol::ImageId(1);
        let stepped = steps.at(Seq(seq), Some(image), |_| ControlFlow::Continue(()));
        let stepped = stepped.await.unwrap().unwrap();
        assert_eq!(stepped.view.digest, digests[seq as usize], "#{seq}");
        assert_eq!((stepped.view.seq, stepped.event.seq), (Seq(seq), Seq(seq)));
        assert_eq!(stepped.event.void.is_some(), void.contains(&Seq(seq)));
        assert!(steps.kept.len() as u64 <= STATES_KEPT.1);
    }
    let none = steps.at(Seq(last + 1), None, |_| ControlFlow::Continue(())).await;
    assert_eq!(none.unwrap_err().kind, FailureKind::NotFound);
}

#[test]
fn states_are_kept_the_denser_the_nearer() {
    let kept: Vec<_> = (1..5_000).filter(|d| is_kept(*d)).collect();
    assert_eq!(kept, [16, 64, 256, 1_024, 4_096]);
}
