//! Hearth's terminal dashboard: a model, an update function and a pure view.
//!
//! [`model::Model`] is everything that is on the screen, [`update::update`] changes it for one message,
//! [`view::draw`] paints it and changes nothing. A frame shows one [`snapshot::Snapshot`], so drawing needs no lock, and live,
//! paused and stepped-back screens are painted by the same code. The crate knows no network: a feed gives it views
//! and takes its wishes through channels ([`terminal::run`]).
//!
//! The tables ([`tables`]) and sentences ([`narrate`]) are also what the `hearth` command prints.

pub mod fmt;
pub mod headless;
pub mod heatmap;
pub mod keys;
pub mod model;
pub mod narrate;
pub mod snapshot;
pub mod table;
pub mod tables;
pub mod terminal;
pub mod theme;
pub mod update;
pub mod view;
