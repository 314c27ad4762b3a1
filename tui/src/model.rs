//! Everything that is on the screen. Nothing here draws, waits or sends.

use std::collections::{BTreeMap, VecDeque};

use hearth_protocol::view::ImageHeatView;
use hearth_protocol::{ImageId, NodeId, Seq};

use crate::snapshot::{History, Snapshot};
use crate::table::{RowId, Sort, Table};
use crate::tables::{self, LogLine};
use crate::theme::Theme;

/// Events kept for the log view.
pub const LOG_LINES_MAX: usize = 5_000;

/// One full-screen view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Screen {
    /// Everything at a glance.
    Overview,
    /// Nodes.
    Nodes,
    /// Images, of one node if named.
    Images(Option<NodeId>),
    /// One image's heat map.
    Heat(ImageId),
    /// What the scheduler ordered, newest first.
    Decisions,
    /// What is wrong.
    Health,
    /// Events.
    Log,
}

impl Screen {
    /// The views with a number, in order, and the names that `:` knows.
    pub const TABS: [(Screen, &'static str, &'static [&'static str]); 6] = [
        (Screen::Overview, "Overview", &["overview", "home"]),
        (Screen::Nodes, "Nodes", &["nodes", "no"]),
        (Screen::Images(None), "Images", &["images", "img"]),
        (Screen::Decisions, "Decisions", &["decisions", "dec"]),
        (Screen::Health, "Health", &["health"]),
        (Screen::Log, "Log", &["log", "events"]),
    ];

    /// Which tab it belongs to.
    pub fn tab(&self) -> usize {
        match self {
            Screen::Overview => 0,
            Screen::Nodes => 1,
            Screen::Images(_) | Screen::Heat(_) => 2,
            Screen::Decisions => 3,
            Screen::Health => 4,
            Screen::Log => 5,
        }
    }
}

/// Which moment is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// The newest.
    Live,
    /// The last one that this screen showed up to this log position.
    At(Seq),
    /// Right after this event.
    Event(Seq),
}

/// The cluster right after one event, derived from the log.
#[derive(Debug, Clone)]
pub struct Moment {
    /// The event.
    pub event: LogLine,
    /// The cluster after it.
    pub snapshot: Snapshot,
}

/// How the feed is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    /// No answer yet.
    Connecting,
    /// Views arrive.
    Up,
    /// They do not, and why.
    Lost(String),
}

/// What is typed at the bottom line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// What for.
    pub kind: PromptKind,
    /// So far.
    pub text: String,
}

/// What a prompt is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptKind {
    /// A view's name.
    Command,
    /// A filter.
    Filter,
    /// A time or a log position.
    Jump,
}

/// A panel over the view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Overlay {
    /// The keys.
    Help {
        /// First line shown.
        scroll: usize,
    },
    /// Text.
    Text {
        /// Its heading.
        title: String,
        /// Its lines.
        lines: Vec<String>,
        /// First line shown.
        scroll: usize,
    },
}

/// What the feed can do; keys for the rest do not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Can {
    /// Explain a block.
    pub why: bool,
    /// Tell of the cluster after any event of the log.
    pub step: bool,
}

/// How one table is looked at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Look {
    /// Only rows with this in them.
    pub filter: String,
    /// The order, the table's own without.
    pub sort: Option<Sort>,
    /// The row under the cursor: the same thing stays under it when rows move.
    pub row: Option<RowId>,
    /// Where it was last.
    pub index: usize,
}

/// Where the heat map is looked at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MapLook {
    /// First block and count shown; the whole image without.
    pub window: Option<(u64, u64)>,
    /// The block under the cursor.
    pub block: u64,
}

/// The whole state of the dashboard.
#[derive(Debug, Clone)]
pub struct Model {
    /// How to paint.
    pub theme: Theme,
    /// Where the views come from, for the header.
    pub source: String,
    /// What the feed can do.
    pub can: Can,
    /// Width and height of the terminal.
    pub size: (u16, u16),
    /// The past.
    pub history: History,
    /// Which moment of it is shown.
    pub position: Position,
    /// What the feed brought last of the events stepped through; none elsewhere.
    pub moment: Option<Moment>,
    /// The feed.
    pub connection: Connection,
    /// The view.
    pub screen: Screen,
    /// The views that Esc goes back to.
    pub back: Vec<Screen>,
    /// How each tab's table is looked at.
    pub looks: BTreeMap<usize, Look>,
    /// How the heat map is looked at.
    pub map: MapLook,
    /// The bottom line, if something is typed.
    pub prompt: Option<Prompt>,
    /// The panel, if one is open.
    pub overlay: Option<Overlay>,
    /// One line about what just happened.
    pub notice: Option<String>,
    /// Events, oldest first.
    pub log: VecDeque<LogLine>,
}

impl Model {
    /// An empty dashboard.
    pub fn new(theme: Theme, source: impl Into<String>, can: Can) -> Self {
        Self {
            theme,
            source: source.into(),
            can,
            size: (80, 24),
            history: History::default(),
            position: Position::Live,
            moment: None,
            connection: Connection::Connecting,
            screen: Screen::Overview,
            back: Vec::new(),
            looks: BTreeMap::new(),
            map: MapLook::default(),
            prompt: None,
            overlay: None,
            notice: None,
            log: VecDeque::new(),
        }
    }

    /// Whether the newest moment is shown.
    pub fn is_live(&self) -> bool {
        self.position == Position::Live
    }

    /// Where in what this screen remembers the shown moment is, or the last one before it.
    pub fn index(&self) -> Option<usize> {
        let newest = self.history.len().checked_sub(1)?;
        match (self.position, &self.moment) {
            (Position::Live, _) => Some(newest),
            (Position::Event(_), Some(moment)) => self.history.at_or_before(moment.event.seq),
            (Position::At(seq) | Position::Event(seq), _) => Some(self.history.at_or_before(seq).unwrap_or(0)),
        }
    }

    /// The shown moment. While the feed looks up an event, the moment shown before stays.
    pub fn snapshot(&self) -> Option<&Snapshot> {
        match self.event() {
            Some(moment) => Some(&moment.snapshot),
            None => self.history.get(self.index()?),
        }
    }

    /// The event that is shown, and what it left behind.
    pub fn event(&self) -> Option<&Moment> {
        matches!(self.position, Position::Event(_))
            .then_some(self.moment.as_ref())
            .flatten()
    }

    /// The log position that is shown.
    pub fn seq(&self) -> Option<Seq> {
        let shown = self.event().map(|moment| moment.event.seq);
        shown.or_else(|| Some(self.snapshot()?.view.seq))
    }

    /// The last log position known.
    pub fn newest(&self) -> Option<Seq> {
        let view = self.history.get(self.history.len().checked_sub(1)?)?.view.seq;
        Some(self.log.back().map_or(view, |line| line.seq.max(view)))
    }

    /// An image's heat at the shown moment.
    pub fn heat(&self, image: ImageId) -> Option<&ImageHeatView> {
        match self.event() {
            Some(moment) => moment.snapshot.heat(image),
            None => self.history.heat(self.index()?, image),
        }
    }

    /// A figure of the `width` last snapshots up to the shown moment, oldest first.
    pub fn series(&self, width: usize, figure: impl Fn(&Snapshot) -> Option<u64>) -> Vec<Option<u64>> {
        self.index()
            .map_or_else(Vec::new, |index| self.history.series(index, width, figure))
    }

    /// The event that the feed should tell of, and the image whose heat then is looked at.
    pub fn wanted_event(&self) -> Option<(Seq, Option<ImageId>)> {
        match self.position {
            Position::Event(seq) => Some((seq, self.wanted_heat())),
            _ => None,
        }
    }

    /// How the current table is looked at.
    pub fn look(&self) -> Look {
        self.looks.get(&self.screen.tab()).cloned().unwrap_or_default()
    }

    /// The image whose heat the feed should bring.
    pub fn wanted_heat(&self) -> Option<ImageId> {
        match self.screen {
            Screen::Heat(image) => Some(image),
            _ => None,
        }
    }

    /// The table of the current view, filtered and sorted; none on the heat map or before the first view.
    pub fn table(&self) -> Option<Table> {
        let look = self.look();
        Some(self.raw_table()?.filtered(&look.filter).sorted(look.sort))
    }

    fn raw_table(&self) -> Option<Table> {
        let snapshot = self.snapshot()?;
        Some(match &self.screen {
            Screen::Heat(_) => return None,
            Screen::Overview => tables::images(&snapshot.view.images),
            Screen::Nodes => tables::nodes(&snapshot.view.nodes),
            Screen::Images(None) => tables::images(&snapshot.view.images),
            Screen::Images(Some(node)) => {
                let of_node: Vec<_> = snapshot
                    .view
                    .images
                    .iter()
                    .filter(|i| &i.node == node)
                    .cloned()
                    .collect();
                tables::images(&of_node)
            }
            Screen::Decisions => tables::decisions(&snapshot.decisions),
            Screen::Health => tables::health(&snapshot.view.health),
            Screen::Log => {
                let shown = self.event().map(|moment| &moment.event);
                let until = shown.map_or(snapshot.view.seq, |event| event.seq);
                let live = self.is_live();
                // An event from before this screen's log stands alone.
                let alone = shown.filter(|event| self.log.front().is_none_or(|first| event.seq < first.seq));
                let lines = self.log.iter().rev().filter(|l| live || l.seq <= until);
                tables::log(lines.chain(alone))
            }
        })
    }

    /// The row of `table` under the cursor.
    pub fn cursor(&self, table: &Table) -> Option<usize> {
        let last = table.rows.len().checked_sub(1)?;
        let look = self.look();
        let found = look.row.and_then(|row| table.rows.iter().position(|r| r.id == row));
        Some(found.unwrap_or(look.index.min(last)))
    }

    /// What is under the cursor.
    pub fn selected(&self) -> Option<RowId> {
        let table = self.table()?;
        let at = self.cursor(&table)?;
        Some(table.rows[at].id.clone())
    }
}

#[cfg(test)]
pub(crate) mod tests;
