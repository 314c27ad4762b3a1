//! The handshake, without I/O: bytes in, bytes out, and in the end an export.
//!
//! Every length is checked before anything is stored. An option that makes no sense gets an error and the session
//! goes on; bytes that cannot be the protocol end it ([`Malformed`]).

use super::proto::{self, Framing, Malformed, be16, be32, be64, export_flag, handshake_flag, option, option_reply};
use super::{ExportEntry, ExportTable};
use crate::disk::ExtentKind;

/// Bytes of an option's header.
const OPTION_HEADER_BYTES: usize = 16;
/// Longest option data that is looked at: a name, and a few dozen of the longest queries.
const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Longest option data that is skipped politely; more ends the session.
const OPTION_SKIP_BYTES_MAX: u32 = 32 << 20;
/// Options in one handshake; a client needs five.
const OPTIONS_MAX: u32 = 1_000;
/// Queries looked at in one option.
const QUERIES_MAX: u32 = 256;
/// Exports named at a time in answer to `LIST`: some 10 KiB, sent before the next are looked up.
const LIST_PAGE: usize = 128;
/// Lists in one handshake; a client needs one.
const LISTS_MAX: u32 = 4;

/// Every metadata context there is; its place is its id on the wire.
pub const CONTEXTS: [(&str, ExtentKind); 4] = [
    ("base:allocation", ExtentKind::Allocation),
    ("hearth:tier", ExtentKind::Tier),
    ("hearth:synced", ExtentKind::Synced),
    ("hearth:heat", ExtentKind::Heat),
];

/// What a client chose.
#[derive(Clone)]
pub struct Chosen {
    /// The name it used.
    pub name: String,
    /// What is behind it.
    pub entry: ExportEntry,
    /// How messages are framed from here on.
    pub framing: Framing,
    /// Metadata contexts it may ask for: id and kind, in the order of selection.
    pub contexts: Vec<(u32, ExtentKind)>,
}

/// What the handshake wants next.
pub enum Step {
    /// More bytes than it was given.
    More,
    /// Nothing yet; call again after sending what it wrote.
    Again,
    /// Transmission begins.
    Transmit(Box<Chosen>),
    /// The client is a node, and what follows is no NBD: what it said of itself.
    Peer(Vec<u8>),
    /// The client said good-bye.
    Ended,
}

enum State {
    ClientFlags,
    Option,
    /// Data of an option that is too long: its number, and bytes still to come.
    Skip(u32, usize),
    /// Within the answer to `LIST`: the last name sent.
    List(String),
}

/// One handshake.
pub struct Handshake {
    state: State,
    framing: Framing,
    zeroes: bool,
    options: u32,
    lists: u32,
    contexts: Option<(String, Vec<(u32, ExtentKind)>)>,
}

impl Default for Handshake {
    fn default() -> Self {
        Self {
            state: State::ClientFlags,
            framing: Framing::Simple,
            zeroes: true,
            options: 0,
            lists: 0,
            contexts: None,
        }
    }
}

/// The greeting that opens every session.
pub fn greeting() -> [u8; 18] {
    let mut out = [0; 18];
    out[0..8].copy_from_slice(&proto::INIT_MAGIC.to_be_bytes());
    out[8..16].copy_from_slice(&proto::OPTION_MAGIC.to_be_bytes());
    let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
    out[16..18].copy_from_slice(&flags.to_be_bytes());
    out
}

/// The transmission flags of an export: each of them true, see the module's table of what is served.
pub fn export_flags(entry: &ExportEntry, framing: Framing) -> u16 {
    let mut flags =
        export_flag::HAS_FLAGS | export_flag::SEND_FLUSH | export_flag::CAN_MULTI_CONN | export_flag::SEND_CACHE;
    if framing >= Framing::Structured {
        flags |= export_flag::SEND_DF;
    }
    flags
        | if entry.is_read_only() {
            export_flag::READ_ONLY
        } else {
            export_flag::SEND_FUA
                | export_flag::SEND_TRIM
                | export_flag::SEND_WRITE_ZEROES
                | export_flag::SEND_FAST_ZERO
        }
}

/// Splits a length-prefixed string off the front.
fn take_string<'a>(data: &mut &'a [u8]) -> Option<&'a str> {
    let length = take_u32(data)? as usize;
    if length > proto::STRING_BYTES_MAX || length > data.len() {
        return None;
    }
    let (string, rest) = data.split_at(length);
    *data = rest;
    std::str::from_utf8(string).ok().filter(|s| !s.contains('\0'))
}

fn take_u32(data: &mut &[u8]) -> Option<u32> {
    let (number, rest) = data.split_at_checked(4)?;
    *data = rest;
    Some(be32(number, 0))
}

impl Handshake {
    /// Takes one message off the front of `input` and appends the answer to `out`. Returns how many bytes of `input`
    /// are used up, and what comes next.
    ///
    /// # Errors
    /// [`Malformed`]: close the connection.
    pub fn step(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
        table: &dyn ExportTable,
    ) -> Result<(usize, Step), Malformed> {
        match &self.state {
            State::ClientFlags if input.len() < 4 => Ok((0, Step::More)),
            State::ClientFlags => {
                let flags = be32(input, 0);
                let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
                if flags & !known != 0 {
                    return Err(Malformed::ClientFlags(flags));
                }
                self.zeroes = flags & u32::from(handshake_flag::NO_ZEROES) == 0;
                self.state = State::Option;
                Ok((4, Step::Again))
            }
            State::List(last) => {
                let names = table.list(last, LIST_PAGE);
                for name in &names {
                    let data = [&(name.len() as u32).to_be_bytes(), name.as_bytes()].concat();
                    proto::put_option_reply(out, option::LIST, option_reply::SERVER, &data);
                }
                self.state = match names.into_iter().next_back() {
                    Some(last) => State::List(last),
                    None => {
                        proto::put_option_reply(out, option::LIST, option_reply::ACK, &[]);
                        State::Option
                    }
                };
                Ok((0, Step::Again))
            }
            &State::Skip(option, left) => {
                let used = left.min(input.len());
                if used < left {
                    self.state = State::Skip(option, left - used);
                    return Ok((used, Step::More));
                }
                let text = format!("option data is limited to {OPTION_BYTES_MAX} bytes");
                proto::put_option_reply(out, option, option_reply::ERR_TOO_BIG, text.as_bytes());
                self.state = State::Option;
                Ok((used, Step::Again))
            }
            State::Option if input.len() < OPTION_HEADER_BYTES => Ok((0, Step::More)),
            State::Option => {
                let magic = be64(input, 0);
                if magic != proto::OPTION_MAGIC {
                    return Err(Malformed::Magic {
                        what: "an option",
                        found: magic,
                    });
                }
                let option = be32(input, 8);
                let length = be32(input, 12);
                if length > OPTION_SKIP_BYTES_MAX || (length > OPTION_BYTES_MAX && option == option::EXPORT_NAME) {
                    return Err(Malformed::OptionLength { option, length });
                }
                if length > OPTION_BYTES_MAX {
                    self.count(option, length)?;
                    self.state = State::Skip(option, length as usize);
                    return Ok((OPTION_HEADER_BYTES, Step::Again));
                }
                let end = OPTION_HEADER_BYTES + length as usize;
                if input.len() < end {
                    return Ok((0, Step::More));
                }
                self.count(option, length)?;
                let step = self.option(option, &input[OPTION_HEADER_BYTES..end], out, table)?;
                Ok((end, step))
            }
        }
    }

    fn count(&mut self, option: u32, length: u32) -> Result<(), Malformed> {
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Err(Malformed::OptionLength { option, length });
        }
        Ok(())
    }

    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        out: &mut Vec<u8>,
        table: &dyn ExportTable,
    ) -> Result<Step, Malformed> {
        let mut reply = |kind: u32, data: &[u8]| proto::put_option_reply(out, option, kind, data);
        match option {
            option::EXPORT_NAME => return self.export_name(data, out, table),
            option::ABORT => {
                reply(option_reply::ACK, &[]);
                return Ok(Step::Ended);
            }
            option::INFO | option::GO => {
                if let Some(chosen) = self.info(option, data, out, table) {
                    return Ok(Step::Transmit(Box::new(chosen)));
                }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(option, data, out, table),
            option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if !data.is_empty() => {
                reply(option_reply::ERR_INVALID, b"this option takes no data");
            }
            option::LIST if self.lists == LISTS_MAX => {
                reply(
                    option_reply::ERR_POLICY,
                    b"the list was sent often enough: connect again",
                );
            }
            option::LIST => {
                self.lists += 1;
                self.state = State::List(String::new());
            }
            option::STRUCTURED_REPLY => {
                self.framing = self.framing.max(Framing::Structured);
                reply(option_reply::ACK, &[]);
            }
            option::EXTENDED_HEADERS => {
                self.framing = Framing::Extended;
                reply(option_reply::ACK, &[]);
            }
            option::PEER if table.peers().is_some() => {
                match table.peers().map_or(Ok(Vec::new()), |door| door.greet(data)) {
                    Ok(answer) => {
                        reply(option_reply::ACK, &answer);
                        return Ok(Step::Peer(data.to_vec()));
                    }
                    Err(why) => reply(option_reply::ERR_POLICY, why.as_bytes()),
                }
            }
            _ => reply(option_reply::ERR_UNSUP, b"this server does not know the option"),
        }
        Ok(Step::Again)
    }

    fn choose(&self, name: &str, entry: ExportEntry) -> Chosen {
        let contexts = match &self.contexts {
            Some((selected_for, contexts)) if selected_for == name => contexts.clone(),
            _ => Vec::new(),
        };
        Chosen {
            name: name.to_owned(),
            entry,
            framing: self.framing,
            contexts,
        }
    }

    fn export_name(&self, data: &[u8], out: &mut Vec<u8>, table: &dyn ExportTable) -> Result<Step, Malformed> {
        let name = std::str::from_utf8(data)
            .ok()
            .filter(|n| n.len() <= proto::STRING_BYTES_MAX);
        let (name, entry) = name
            .and_then(|n| Some((n, table.find(n)?)))
            .ok_or(Malformed::UnknownExport)?;
        table.admit(name, &entry).map_err(Malformed::Refused)?;
        out.extend_from_slice(&entry.disk.size_bytes().to_be_bytes());
        out.extend_from_slice(&export_flags(&entry, self.framing).to_be_bytes());
        if self.zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Ok(Step::Transmit(Box::new(self.choose(name, entry))))
    }

    /// Answers `INFO` and `GO`. `Some` if transmission begins.
    fn info(&self, option: u32, data: &[u8], out: &mut Vec<u8>, table: &dyn ExportTable) -> Option<Chosen> {
        let mut reply = |kind: u32, data: &[u8]| proto::put_option_reply(out, option, kind, data);
        let mut rest = data;
        let name = take_string(&mut rest);
        let requests = rest
            .split_at_checked(2)
            .filter(|(count, list)| list.len() == usize::from(be16(count, 0)) * 2);
        let (Some(name), Some((_, requests))) = (name, requests) else {
            reply(option_reply::ERR_INVALID, b"the option's lengths do not add up");
            return None;
        };
        let Some(entry) = table.find(name) else {
            reply(option_reply::ERR_UNKNOWN, unknown(name).as_bytes());
            return None;
        };
        if option == option::GO
            && let Err(why) = table.admit(name, &entry)
        {
            reply(option_reply::ERR_POLICY, why.as_bytes());
            return None;
        }
        let wants = |kind: u16| requests.chunks_exact(2).any(|request| be16(request, 0) == kind);
        let mut export = proto::info::EXPORT.to_be_bytes().to_vec();
        export.extend_from_slice(&entry.disk.size_bytes().to_be_bytes());
        export.extend_from_slice(&export_flags(&entry, self.framing).to_be_bytes());
        reply(option_reply::INFO, &export);
        if wants(proto::info::NAME) {
            reply(
                option_reply::INFO,
                &[&proto::info::NAME.to_be_bytes(), name.as_bytes()].concat(),
            );
        }
        if wants(proto::info::DESCRIPTION) && !entry.description.is_empty() {
            let mut end = entry.description.len().min(proto::STRING_BYTES_MAX);
            while !entry.description.is_char_boundary(end) {
                end -= 1;
            }
            let text = &entry.description.as_bytes()[..end];
            reply(
                option_reply::INFO,
                &[&proto::info::DESCRIPTION.to_be_bytes(), text].concat(),
            );
        }
        let mut sizes = proto::info::BLOCK_SIZE.to_be_bytes().to_vec();
        sizes.extend_from_slice(&1_u32.to_be_bytes());
        sizes.extend_from_slice(&entry.preferred_bytes().to_be_bytes());
        sizes.extend_from_slice(&proto::PAYLOAD_BYTES_MAX.to_be_bytes());
        reply(option_reply::INFO, &sizes);
        reply(option_reply::ACK, &[]);
        (option == option::GO).then(|| self.choose(name, entry))
    }

    fn meta_context(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>, table: &dyn ExportTable) {
        let setting = option == option::SET_META_CONTEXT;
        if setting {
            self.contexts = None; // replaced, also when this fails
        }
        let mut reply = |kind: u32, data: &[u8]| proto::put_option_reply(out, option, kind, data);
        if self.framing == Framing::Simple {
            return reply(option_reply::ERR_INVALID, b"negotiate structured replies first");
        }
        let mut rest = data;
        let (Some(name), Some(count)) = (take_string(&mut rest), take_u32(&mut rest)) else {
            return reply(option_reply::ERR_INVALID, b"the option's lengths do not add up");
        };
        if count > QUERIES_MAX {
            return reply(option_reply::ERR_TOO_BIG, b"too many queries");
        }
        let mut matched = [count == 0 && !setting; CONTEXTS.len()];
        for _ in 0..count {
            let Some(query) = take_string(&mut rest) else {
                return reply(option_reply::ERR_INVALID, b"the option's lengths do not add up");
            };
            for ((context, _), matched) in CONTEXTS.iter().zip(&mut matched) {
                let is_namespace = !setting && query.ends_with(':') && context.starts_with(query);
                *matched |= *context == query || is_namespace;
            }
        }
        if !rest.is_empty() {
            return reply(option_reply::ERR_INVALID, b"the option's lengths do not add up");
        }
        if table.find(name).is_none() {
            return reply(option_reply::ERR_UNKNOWN, unknown(name).as_bytes());
        }
        let mut selected = Vec::new();
        for (place, (context, kind)) in CONTEXTS.iter().enumerate() {
            if matched[place] {
                let id = if setting { place as u32 + 1 } else { 0 };
                reply(
                    option_reply::META_CONTEXT,
                    &[&id.to_be_bytes(), context.as_bytes()].concat(),
                );
                selected.push((id, *kind));
            }
        }
        reply(option_reply::ACK, &[]);
        if setting {
            self.contexts = Some((name.to_owned(), selected));
        }
    }
}

fn unknown(name: &str) -> String {
    let shown: String = name.chars().take(80).collect();
    format!("no export {shown:?} here; `nbdinfo --list` names them, `hearth image attach` adds one")
}

#[cfg(test)]
mod tests {
    use super::super::memory::{MemoryDisk, OneExport};
    use super::*;
    use proptest::prelude::*;

    fn table() -> OneExport {
        OneExport::new("p/disk", MemoryDisk::new(1 << 20))
    }

    /// Option, kind and data.
    type Reply = (u32, u32, Vec<u8>);

    /// Feeds `options` after the client's flags; returns the replies, and how it ended.
    fn talk(flags: u32, options: &[(u32, Vec<u8>)]) -> (Vec<Reply>, Option<Step>) {
        let mut input = flags.to_be_bytes().to_vec();
        for (option, data) in options {
            proto::put_option(&mut input, *option, data);
        }
        let (mut handshake, mut out, mut at) = (Handshake::default(), Vec::new(), 0);
        let table = table();
        let last = loop {
            match handshake.step(&input[at..], &mut out, &table) {
                Ok((used, Step::Again)) => at += used,
                Ok((_, Step::More)) => break Some(Step::More),
                Ok((_, step)) => break Some(step),
                Err(_) => break None,
            }
        };
        let mut replies = Vec::new();
        let mut rest = out.as_slice();
        while rest.len() >= 20 && be64(rest, 0) == proto::OPTION_REPLY_MAGIC {
            let length = be32(rest, 16) as usize;
            replies.push((be32(rest, 8), be32(rest, 12), rest[20..20 + length].to_vec()));
            rest = &rest[20 + length..];
        }
        (replies, last)
    }

    fn go(name: &str) -> Vec<u8> {
        [&(name.len() as u32).to_be_bytes(), name.as_bytes(), &[0, 0]].concat()
    }

    fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut data = [&(name.len() as u32).to_be_bytes(), name.as_bytes()].concat();
        data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
        for query in queries {
            data.extend_from_slice(&(query.len() as u32).to_be_bytes());
            data.extend_from_slice(query.as_bytes());
        }
        data
    }

    fn chosen(step: Option<Step>) -> Chosen {
        match step {
            Some(Step::Transmit(chosen)) => *chosen,
            _ => panic!("transmission did not begin"),
        }
    }

    #[test]
    fn go_with_contexts_begins_transmission() {
        let (replies, end) = talk(
            3,
            &[
                (option::STRUCTURED_REPLY, vec![]),
                (
                    option::SET_META_CONTEXT,
                    queries("p/disk", &["base:allocation", "hearth:tier", "x:y", "hearth:"]),
                ),
                (option::GO, go("p/disk")),
            ],
        );
        let chosen = chosen(end);
        assert_eq!(chosen.framing, Framing::Structured);
        assert_eq!(chosen.contexts, [(1, ExtentKind::Allocation), (2, ExtentKind::Tier)]);
        assert!(replies.iter().all(|(_, kind, _)| *kind < 1 << 31));
    }

    #[test]
    fn contexts_belong_to_the_export_they_were_selected_for() {
        let (_, end) = talk(
            3,
            &[
                (option::STRUCTURED_REPLY, vec![]),
                (option::SET_META_CONTEXT, queries("p/disk", &["base:allocation"])),
                (option::SET_META_CONTEXT, queries("p/other", &["base:allocation"])),
                (option::GO, go("p/disk")),
            ],
        );
        assert!(chosen(end).contexts.is_empty());
    }

    #[test]
    fn errors_leave_the_session_alive() {
        let (name, too_long) = ("p/disk", vec![0; (OPTION_BYTES_MAX + 1) as usize]);
        let cases: [(u32, Vec<u8>, u32); 10] = [
            (option::STARTTLS, vec![], option_reply::ERR_UNSUP),
            (77, vec![1, 2, 3], option_reply::ERR_UNSUP),
            (77, too_long, option_reply::ERR_TOO_BIG),
            (option::LIST, vec![0], option_reply::ERR_INVALID),
            (option::GO, go("p/none"), option_reply::ERR_UNKNOWN),
            (option::GO, vec![0xff; 6], option_reply::ERR_INVALID),
            (option::GO, [go(name), vec![1]].concat(), option_reply::ERR_INVALID),
            (option::GO, go(&"x".repeat(4_097)), option_reply::ERR_INVALID),
            (
                option::SET_META_CONTEXT,
                queries(name, &["base:allocation"]),
                option_reply::ERR_INVALID,
            ),
            (option::LIST_META_CONTEXT, queries(name, &[]), option_reply::ERR_INVALID),
        ];
        for (option, data, expected) in cases {
            let (replies, end) = talk(3, &[(option, data), (option::GO, go(name))]);
            assert_eq!((replies[0].0, replies[0].1), (option, expected));
            chosen(end);
        }
    }

    #[test]
    fn nonsense_ends_the_session() {
        assert!(talk(4, &[]).1.is_none(), "unknown client flag");
        assert!(talk(3, &[(option::EXPORT_NAME, b"p/none".to_vec())]).1.is_none());
        let mut handshake = Handshake {
            state: State::Option,
            ..Handshake::default()
        };
        let mut huge = proto::OPTION_MAGIC.to_be_bytes().to_vec();
        huge.extend_from_slice(&[0, 0, 0, 77, 0xff, 0xff, 0xff, 0xff]);
        assert!(handshake.step(&huge, &mut Vec::new(), &table()).is_err());
        assert!(handshake.step(&[0; 16], &mut Vec::new(), &table()).is_err());
        let many: Vec<_> = (0..=OPTIONS_MAX).map(|_| (77, vec![])).collect();
        assert!(talk(3, &many).1.is_none());
    }

    #[test]
    fn export_name_sends_zeroes_unless_told_otherwise() {
        for (flags, expected) in [(1, 8 + 2 + 124), (3, 8 + 2)] {
            let mut handshake = Handshake::default();
            let mut out = Vec::new();
            let mut input = u32::to_be_bytes(flags).to_vec();
            proto::put_option(&mut input, option::EXPORT_NAME, b"p/disk");
            let (used, _) = handshake.step(&input, &mut out, &table()).unwrap();
            let (_, step) = handshake.step(&input[used..], &mut out, &table()).unwrap();
            assert!(matches!(step, Step::Transmit(_)) && out.len() == expected);
        }
    }

    #[test]
    fn lists_and_wildcards() {
        let structured = (option::STRUCTURED_REPLY, vec![]);
        let count = |option: u32, data: Vec<u8>, kind: u32| {
            let (replies, _) = talk(3, &[structured.clone(), (option, data)]);
            replies.iter().filter(|(_, k, _)| *k == kind).count()
        };
        assert_eq!(count(option::LIST, vec![], option_reply::SERVER), 1);
        let list = |q: &[&str]| {
            count(
                option::LIST_META_CONTEXT,
                queries("p/disk", q),
                option_reply::META_CONTEXT,
            )
        };
        assert_eq!(list(&[]), 4);
        assert_eq!(list(&["hearth:"]), 3);
        assert_eq!(list(&["base:", "hearth:heat", "nonsense", "other:"]), 2);
        let set = |q: &[&str]| {
            count(
                option::SET_META_CONTEXT,
                queries("p/disk", q),
                option_reply::META_CONTEXT,
            )
        };
        assert_eq!(set(&[]), 0);
        assert_eq!(set(&["base:"]), 0);
    }

    proptest! {
        #[test]
        fn any_bytes_end_without_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            option in 0_u32..16,
            data in proptest::collection::vec(0_u8..9, 0..64),
        ) {
            let mut input = 3_u32.to_be_bytes().to_vec();
            proto::put_option(&mut input, option::STRUCTURED_REPLY, &[]);
            proto::put_option(&mut input, option, &data);
            input.extend_from_slice(&bytes);
            let (mut handshake, mut out, mut at) = (Handshake::default(), Vec::new(), 0);
            while let Ok((used, Step::Again)) = handshake.step(&input[at..], &mut out, &table()) {
                at += used;
            }
            prop_assert!(at <= input.len());
        }
    }
}
