//! Transactions of every kind, in an order in which each is possible.

use gleaner::{Block, Error, PageRange, Tracker, Transaction, TransactionReport};

use super::hand::{Hand, gpa};

/// Pages of the block that is mapped from [`BASE`] on.
pub const PAGES: u64 = 200;

/// What a transaction does, and its name.
pub type Change = (&'static str, fn(&mut Transaction<'_>, &Block));

/// Transactions of every kind, each possible after those before it.
pub const CHANGES: [Change; 12] = [
    ("split", |tx, _| {
        tx.split(1, 77, 2);
    }),
    ("punch", |tx, _| {
        tx.punch(2, PageRange::new(13, 9), 3);
    }),
    ("fill", |tx, block| {
        tx.create(4, gpa(90), block.extent(PageRange::new(90, 9)));
    }),
    ("merge", |tx, _| {
        tx.merge(2, 4).merge(2, 3);
    }),
    ("move", |tx, _| {
        tx.move_to(2, gpa(1000));
    }),
    ("swap", |tx, _| {
        tx.move_to(2, gpa(0)).move_to(1, gpa(123));
    }),
    ("readonly", |tx, _| {
        tx.set_readonly(1, true);
    }),
    ("writable", |tx, _| {
        tx.set_readonly(1, false);
    }),
    ("alias", |tx, block| {
        tx.create(5, gpa(2000), block.extent(block.info().all()));
    }),
    ("resize", |tx, _| {
        tx.resize(5, 65);
    }),
    ("delete", |tx, _| {
        tx.delete(5);
    }),
    ("home again", |tx, block| {
        tx.delete(1)
            .delete(2)
            .create(1, gpa(0), block.extent(block.info().all()));
    }),
];

/// Makes one of them.
pub fn change(
    tracker: &Tracker,
    block: &Block,
    (_, change): Change,
) -> Result<TransactionReport, Error> {
    let mut tx = tracker.transaction();
    change(&mut tx, block);
    tx.commit()
}

/// The guest writes every page, so that all of them are mapped.
pub fn warm(hand: &mut Hand) -> Block {
    let block = hand.plug("ram", PAGES, 1, gpa(0));
    hand.write(gpa(0), PAGES, 1);
    block
}
