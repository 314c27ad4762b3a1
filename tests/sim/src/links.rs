//! Sends and delivers messages over the connections of [`crate::net`], and breaks these.

use hearth_replication::request::{Answer, Refusal, RequestId};
use hearth_replication::session::{Input, Message};

use crate::carry::name;
use crate::disk::Value;
use crate::event::Event;
use crate::net::{Key, Letter, Net};
use crate::world::World;

impl World {
    /// A message goes out.
    pub fn send(&mut self, from: usize, to: usize, image: usize, message: Message, values: Vec<Value>) {
        if let Message::Answer {
            answer: Answer::Refused(refusal),
            ..
        }
        | Message::NotRaised { refusal, .. } = &message
        {
            self.counters.count(&format!("refused: {}", name(refusal)));
        }
        let (key, to_server) = Net::key(image, from, to, &message);
        if let Message::Answer { id, stamp, answer } = &message {
            let asked = (image, self.nodes[to].id.clone(), *id, stamp.set_version);
            let late = self.nodes[from]
                .daemon
                .as_mut()
                .is_some_and(|daemon| daemon.late.remove(&asked));
            if late {
                if matches!(
                    answer,
                    Answer::Refused(Refusal::EpochEnded { .. } | Refusal::SetChanged { .. })
                ) {
                    self.counters.count("late request refused");
                }
                return;
            }
        }
        let net_us = self.plan.net_us;
        let us = self.chance.delay(net_us, 2_000_000, 3);
        // Between the break and the client's notice everything is lost.
        if self.net.broken.contains(&(key.0, key.1, key.2)) {
            return;
        }
        let connection = self.net.connections.entry(key).or_default();
        let at = (self.now_us + us).max(connection.last[usize::from(to_server)] + 1);
        connection.last[usize::from(to_server)] = at;
        let life = connection.life;
        let letter = Letter {
            key,
            life,
            to_server,
            message,
            values,
            late: false,
        };
        self.at(at, Event::Arrives(letter));
    }

    /// A message arrives, or would.
    pub fn arrives(&mut self, mut letter: Letter) -> Result<(), String> {
        let (from, to) = letter.ends();
        let image = letter.key.0;
        let dead = self.nodes[to].daemon.is_none();
        let cut = self.net.is_cut(from, to);
        let impatience = self.chance.within(500_000, 8_000_000);
        let connection = self.net.connections.entry(letter.key).or_default();
        if !letter.late {
            if connection.life != letter.life {
                let Some((left, us)) = connection.leftovers.get_mut(&letter.life) else {
                    return Ok(());
                };
                if !letter.to_server || *left == 0 || dead {
                    return Ok(());
                }
                *left -= 1;
                let us = *us;
                letter.late = true;
                self.after(us, Event::Arrives(letter));
                return Ok(());
            }
            if cut || !connection.stuck.is_empty() {
                if connection.stuck.is_empty() {
                    let (key, life) = (letter.key, letter.life);
                    connection.stuck.push_back(letter);
                    self.after(impatience, Event::TimesOut { key, life });
                } else {
                    connection.stuck.push_back(letter);
                }
                return Ok(());
            }
            if dead {
                // A node without power does not even refuse.
                let us = if self.nodes[to].power { 0 } else { 1_500_000 };
                self.break_connection(letter.key, us);
                return Ok(());
            }
        } else if dead {
            return Ok(());
        }
        let id = self.nodes[from].id.clone();
        if letter.late {
            self.note(|| format!("n{to} i{image}: late from {id}"));
            if let (Message::Request(request), Some(daemon)) = (&letter.message, &mut self.nodes[to].daemon) {
                let asked = (image, id.clone(), request.id, request.stamp.set_version);
                daemon.late.insert(asked);
            }
        }
        let request = match &letter.message {
            Message::Request(request) => request.id,
            Message::Answer { id, .. } => *id,
            _ => RequestId(0),
        };
        let came = Some((id.clone(), request, letter.values));
        let message = letter.message;
        self.step(to, image, Input::Peer { from: id, message }, came)
    }

    /// The connections of a pair break: both ends learn of it, the client not before some time.
    pub fn break_connection(&mut self, key: Key, us: u64) {
        let (image, client, server, _) = key;
        let pair = (image, client, server);
        let keeps = self.chance.below(6);
        let late_us = self.chance.delay(200_000, 9_000_000, 300);
        let client_us = us + self.chance.delay(5_000, 2_000_000, 100);
        let server_us = us + self.chance.delay(50_000, 4_000_000, 200);
        let known = !self.net.broken.contains(&pair);
        for key in self.net.siblings(key) {
            let connection = self.net.connections.entry(key).or_default();
            connection.stuck.clear();
            if known {
                connection.leftovers.clear();
                connection.leftovers.insert(connection.life, (keeps, late_us));
                connection.life += 1;
            }
        }
        if self.nodes[client].daemon.is_some() {
            self.net.broken.insert(pair);
        } else {
            self.net.broken.remove(&pair);
        }
        if !known {
            return;
        }
        for (node, peer, us) in [(client, server, client_us), (server, client, server_us)] {
            if let Some(life) = self.nodes[node].daemon.as_ref().map(|daemon| daemon.life) {
                let ends = node == client;
                self.after(
                    us,
                    Event::Lost {
                        node,
                        life,
                        image,
                        peer,
                        ends,
                    },
                );
            }
        }
    }

    /// Everything passes from one node to another again.
    pub fn heals(&mut self, from: usize, to: usize) {
        self.net.cut.remove(&(from, to));
        let mut held = Vec::new();
        for ((_, client, server, _), connection) in &mut self.net.connections {
            if [(from, to), (to, from)].contains(&(*client, *server)) {
                held.extend(connection.stuck.drain(..));
            }
        }
        for (at, letter) in held.into_iter().enumerate() {
            self.after(1 + at as u64, Event::Arrives(letter));
        }
    }
}
