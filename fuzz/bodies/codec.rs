//! Everything that travels: frames, events, heat, requests and answers, and what the fold makes of any sequence of
//! them.
//!
//! What must hold: no panic; what decodes, encodes and decodes to the same; the fold is total, its accounts add up,
//! and a snapshot reads back as the same state.

use hearth_protocol::heat::{HeatReport, PackedHeat, pack};
use hearth_protocol::rpc::{Answer, NodeReply, NodeRequest, SchedulerReply, SchedulerRequest};
use hearth_protocol::{Message, Seq};
use scheduler_core::State;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Records looked at of one packed column; a 4 KiB input holds no more.
const RECORDS_MAX: usize = 1 << 16;

/// The first byte says what the rest is.
pub fn run(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else {
        return;
    };
    match kind % 5 {
        0 => drop(frame(rest)),
        1 => report(rest),
        2 => packed(rest),
        3 => requests(rest),
        _ => history(rest),
    }
}

fn frame(bytes: &[u8]) -> Option<Message> {
    let message = Message::from_frame(bytes).ok()?;
    assert_eq!(message.to_frame(), bytes);
    let (envelope, event) = (message.envelope().ok()?, message.event().ok()?);
    let again = Message::encode(&envelope, &event);
    assert_eq!(again.envelope().expect("what was decoded, encodes"), envelope);
    assert_eq!(again.event().expect("what was decoded, encodes"), event);
    Some(message)
}

fn report(bytes: &[u8]) {
    let Ok(report) = HeatReport::decode(bytes) else { return };
    assert_eq!(
        HeatReport::decode(&report.encode()).expect("what was decoded, encodes"),
        report
    );
    for layer in report.images.iter().flat_map(|image| &image.layers) {
        let _ = layer.blocks.iter().take(RECORDS_MAX).count();
    }
}

fn packed(bytes: &[u8]) {
    if let Ok(records) = PackedHeat(bytes.to_vec()).unpack() {
        assert_eq!(pack(&records).unpack().as_ref(), Ok(&records));
    }
}

fn requests(bytes: &[u8]) {
    json::<NodeRequest>(bytes);
    json::<SchedulerRequest>(bytes);
    json::<Answer<NodeReply>>(bytes);
    json::<Answer<SchedulerReply>>(bytes);
}

fn json<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<T>(bytes) {
        let text = serde_json::to_vec(&value).expect("what was decoded, encodes");
        assert_eq!(serde_json::from_slice::<T>(&text).expect("and decodes"), value);
    }
}

/// A log: frames behind their lengths (u16, little-endian). Each is folded; the answer to a tick is computed too.
fn history(mut bytes: &[u8]) {
    let mut state = State::default();
    let mut seq = 0;
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let (one, rest) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
        bytes = rest;
        seq += 1;
        if let Some(message) = frame(one)
            && let (Ok(envelope), Ok(event)) = (message.envelope(), message.event())
        {
            let applied = state.apply(Seq(seq), &envelope, &event);
            if applied.decide {
                let commands = state.decide();
                assert_eq!(commands, state.decide(), "a decision is a function of the state");
            }
        }
    }
    if let Err(what) = state.audit() {
        panic!("{what}");
    }
    let snapshot = rmp_serde::to_vec_named(&state).expect("a state always encodes");
    let again: State = rmp_serde::from_slice(&snapshot).expect("and decodes");
    assert_eq!(again.digest(), state.digest());
}
