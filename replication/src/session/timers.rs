//! What a session does when time has passed.

use super::waits::Waits;
use super::{Inner, Message, Output, Role, Session, Step};
use crate::mutants::Mutant;
use crate::owner::{self, Owner};
use crate::takeover::{self, Takeover};
use crate::time::{
    ASK_AGAIN_MS, ASK_MS, BootMs, OVERSLEPT_MS, PUBLISH_AGAIN_MS, RAISE_AGAIN_MS, SEALED_AGAIN_MS, SILENT_MS,
};

impl Session {
    /// A node that stood still does not hold that against others.
    pub(super) fn overslept(&mut self, now: BootMs) {
        if self.wake_at.is_some_and(|wake_at| now > wake_at.after(OVERSLEPT_MS)) {
            self.waits.anew(now);
        }
    }

    /// When something is due.
    pub(super) fn due(&self) -> Option<BootMs> {
        let silent = self.owner().is_some_and(Owner::is_busy);
        let opens = match &self.role {
            Role::Taking(takeover, _) => Takeover::opens_at(takeover),
            _ => None,
        };
        let waits = self.waits.due(self.renews_at(), silent, self.frozen);
        [waits, opens].into_iter().flatten().min()
    }

    fn renews_at(&self) -> Option<BootMs> {
        let owner = self.owner()?;
        let until = owner.answers_until()?;
        let renewed = self.waits.renewed?;
        self.waits.renews_at(until <= renewed)
    }

    /// Does what is due.
    pub(super) fn fire(&mut self, step: &mut Step) {
        let now = step.now;
        if let Some((change, again)) = &mut self.waits.publish
            && *again <= now
            && !self.frozen
        {
            *again = now.after(PUBLISH_AGAIN_MS);
            let change = change.clone();
            step.out.push(Output::Publish(change.clone()));
            if self.rules.breaks(Mutant::SilenceCounts) {
                self.logged(&change, step);
            }
        }
        if self.waits.take_again.is_some_and(|at| at <= now) && !self.frozen {
            self.take_again(step);
        }
        self.ask(step);
        if let Some(handing) = &mut self.waits.handing
            && handing.again <= now
        {
            handing.again = now.after(SEALED_AGAIN_MS);
            let (to, message) = (handing.to.clone(), handing.message.clone());
            step.says(to, message);
        }
        for node in self.waits.unanswered(now) {
            let given_up = match &self.role {
                Role::Owning(owner) => owner.spares(&node),
                _ => node != self.me,
            };
            if given_up {
                self.fail(node, step);
            }
        }
        let again: Vec<_> = self
            .waits
            .raises
            .iter_mut()
            .filter(|(_, raising)| raising.again <= now)
            .map(|(to, raising)| {
                raising.again = now.after(RAISE_AGAIN_MS);
                (to.clone(), raising.message.clone())
            })
            .collect();
        for (to, message) in again {
            self.post(to, message, step);
        }
        if self.renews_at().is_some_and(|at| at <= now) {
            self.waits.renewed = Some(now);
            step.todo.push_back(Inner::Owner(owner::Input::Renew));
        }
        self.silent(step);
        if let Role::Taking(takeover, _) = &self.role
            && takeover.opens_at().is_some_and(|at| at <= now)
        {
            step.todo.push_back(Inner::Takeover(takeover::Input::Tick));
        }
    }

    fn ask(&mut self, step: &mut Step) {
        let Some(asking) = &mut self.waits.asking else { return };
        if asking.since.after(ASK_MS) <= step.now {
            return self.reached(step);
        }
        if asking.again <= step.now {
            asking.again = step.now.after(ASK_AGAIN_MS);
            let (lease, left) = (asking.lease, asking.left.clone());
            for to in left {
                self.post(to, Message::Ask(lease), step);
            }
        }
    }

    /// Gives up members whose lease is missing for too long.
    fn silent(&mut self, step: &mut Step) {
        let Role::Owning(owner) = &self.role else { return };
        let Waits { silent, .. } = &mut self.waits;
        if silent.is_empty() {
            return;
        }
        let needed = owner.needed();
        silent.retain(|node, _| needed.contains(node));
        if !owner.is_busy() {
            return;
        }
        let mut failed = Vec::new();
        for (node, since) in silent {
            if since.after(SILENT_MS) <= step.now {
                *since = step.now;
                if owner.spares(node) {
                    failed.push(node.clone());
                }
            }
        }
        for node in failed {
            self.fail(node, step);
        }
    }
}
