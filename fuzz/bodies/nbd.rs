//! A whole NBD session as a client's bytes: handshake, requests, payloads, against a disk in memory.
//!
//! What must hold: no panic, no endless loop, nothing admitted that reaches past the disk or the payload limit, and
//! every read answers what a plain array with the same writes holds.

use std::sync::Arc;

use hearth_node::disk::Disk;
use hearth_node::export::nbd::buffer::BufferPool;
use hearth_node::export::nbd::handshake::{Handshake, Step};
use hearth_node::export::nbd::job::{Job, Outcome, Piece, Terms};
use hearth_node::export::nbd::memory::{MemoryDisk, OneExport};
use hearth_node::export::nbd::name::ExportName;
use hearth_node::export::nbd::output::{Output, REPLY_ROOM_BYTES};
use hearth_node::export::nbd::proto::{self, Framing, PAYLOAD_BYTES_MAX, command};

const BLOCK: u64 = 4_096;
const SIZE: u64 = 32 * BLOCK;
/// What the handshake may answer to one message: a few replies, none longer than a name or a description.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// One session. The first byte says how many bytes arrive at a time.
pub fn run(data: &[u8]) {
    let Some((&pace, client)) = data.split_first() else {
        return;
    };
    if let Ok(text) = std::str::from_utf8(client)
        && let Ok(name) = text.parse::<ExportName>()
    {
        assert_eq!(name.to_string(), text);
    }
    let step_bytes = usize::from(pace) + 1;
    let disk = Arc::new(MemoryDisk::with_blocks(SIZE, BLOCK));
    let table = OneExport::shared("p/d", disk.clone());
    let (mut handshake, mut out) = (Handshake::default(), Vec::new());
    let (mut at, mut arrived) = (0, 0);
    let chosen = loop {
        let Ok((used, step)) = handshake.step(&client[at..arrived], &mut out, &table) else {
            return;
        };
        assert!(out.len() <= ANSWER_BYTES_MAX, "an answer of {} bytes", out.len());
        out.clear();
        assert!(used <= arrived - at);
        at += used;
        match step {
            Step::Again => {}
            Step::Ended | Step::Peer(_) => return,
            Step::Transmit(chosen) => break *chosen,
            Step::More if arrived == client.len() => return,
            Step::More => arrived = (arrived + step_bytes).min(client.len()),
        }
    };
    transmit(&client[at..], chosen.framing, chosen.contexts, disk);
}

fn transmit(
    mut rest: &[u8],
    framing: Framing,
    contexts: Vec<(u32, hearth_node::disk::ExtentKind)>,
    disk: Arc<MemoryDisk>,
) {
    let terms = Arc::new(Terms {
        size: SIZE,
        block_size: BLOCK,
        read_only: false,
        structured: framing >= Framing::Structured,
        contexts,
    });
    let pool = BufferPool::new(0);
    let mut model = vec![0_u8; SIZE as usize];
    let mut output = Output::default();
    while let Ok(Some(request)) = proto::parse_request(framing, rest) {
        rest = &rest[framing.request_bytes()..];
        if request.command == command::DISC {
            return;
        }
        let payload = usize::try_from(request.payload_length).unwrap_or(usize::MAX);
        let outcome = match terms.check(&request) {
            Err(failure) => Outcome::Failed(failure),
            Ok(()) => {
                assert!(
                    request
                        .offset
                        .checked_add(request.length)
                        .is_some_and(|end| end <= SIZE)
                );
                let moves_data = matches!(request.command, command::READ | command::WRITE);
                assert!(!moves_data || request.length <= PAYLOAD_BYTES_MAX.into());
                let (from, length) = (request.offset as usize, request.length as usize);
                let mut buffer = (moves_data && length > 0).then(|| pool.take(length));
                if request.command == command::WRITE {
                    let Some(bytes) = rest.get(..payload) else { return };
                    if let Some(buffer) = &mut buffer {
                        buffer.copy_from_slice(bytes);
                    }
                    model[from..from + length].copy_from_slice(bytes);
                } else if matches!(request.command, command::TRIM | command::WRITE_ZEROES) {
                    model[from..from + length].fill(0);
                }
                if moves_data && length == 0 {
                    Outcome::Done
                } else {
                    let disk: Arc<dyn Disk> = disk.clone();
                    Job {
                        request,
                        buffer,
                        disk,
                        terms: Arc::clone(&terms),
                    }
                    .run()
                }
            }
        };
        check(&outcome, &request, &model);
        let Some(after) = rest.get(payload..) else { return };
        rest = after;
        if output.room() < REPLY_ROOM_BYTES {
            output = Output::default();
        }
        output.reply(framing, &request, outcome, 0);
    }
}

/// Compares an answer with the model.
fn check(outcome: &Outcome, request: &proto::Request, model: &[u8]) {
    let from = request.offset as usize;
    match outcome {
        Outcome::Done | Outcome::Failed(_) => {}
        Outcome::Data(bytes) => assert!(bytes[..] == model[from..from + bytes.len()]),
        Outcome::Pieces(bytes, pieces) => {
            let mut next = 0;
            for piece in pieces {
                let (start, length, found) = match *piece {
                    Piece::Data { start, length } => (start, length, Some(&bytes[start..start + length])),
                    Piece::Hole { start, length } => (start, length, None),
                };
                assert_eq!(start, next);
                next += length;
                let expected = &model[from + start..from + start + length];
                assert!(found.map_or_else(|| expected.iter().all(|b| *b == 0), |found| found == expected));
            }
            assert_eq!(next as u64, request.length);
        }
        Outcome::Status(contexts) => {
            for (_, extents) in contexts {
                let described: u64 = extents.iter().map(|e| e.length).sum();
                assert!(described > 0 && described <= request.length);
            }
        }
    }
}
